"""What the config classes share: checks of field values, and names that users of other libraries pass.

Three kinds of foreign names are no fields of a config: other spellings of a field; arguments that mean nothing in JAX,
accepted with one warning; arguments that would change the result and are not supported, which raise unless they ask
for nothing.
"""

import dataclasses
import difflib
import functools
import math
import numbers
import types
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin


class ForeignNames(NamedTuple):
    """Arguments of TRL, Hugging Face and Unsloth that are no fields.

    aliases: other name -> the field. ignored: could not change what a run here computes. refused: name -> (the value
    that asks for nothing, what to do instead).
    """

    aliases: Mapping[str, str]
    ignored: frozenset[str]
    refused: Mapping[str, tuple[Any, str]]

    def extended(
        self,
        aliases: Mapping[str, str] | None = None,
        ignored: str = "",
        refused: Mapping[str, tuple[Any, str]] | None = None,
    ) -> "ForeignNames":
        """These and more; `ignored` are names divided by spaces."""
        return ForeignNames(
            {**self.aliases, **(aliases or {})},
            self.ignored | set(ignored.split()),
            {**self.refused, **(refused or {})},
        )

    @property
    def names(self) -> set[str]:
        return {*self.aliases, *self.ignored, *self.refused}


def tolerant[T](cls: type[T]) -> type[T]:
    """Lets the constructor of a config class take the names of its FOREIGN besides its fields."""
    generated = cls.__init__

    @functools.wraps(generated)
    def __init__(self, *args, **kwargs):
        generated(self, *args, **own_arguments(cls, kwargs))

    cls.__init__ = __init__
    return cls


def own_arguments(cls: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """kwargs with the foreign names renamed, dropped with one warning, or refused."""
    foreign: ForeignNames = cls.FOREIGN
    fields = {field.name for field in dataclasses.fields(cls)}
    own, ignored = {}, []
    for name, value in cls.translated(kwargs).items():
        name = foreign.aliases.get(name, name)
        if name in fields:
            if name in own and own[name] != value:
                raise ValueError(f"{name} is given twice under different names: {own[name]!r} and {value!r}")
            own[name] = value
        elif name in foreign.refused:
            neutral, advice = foreign.refused[name]
            if value is not None and value != neutral:
                raise ValueError(f"{cls.__name__}: {name}={value!r} is not supported; {advice}")
        elif name in foreign.ignored:
            ignored.append(name)
        else:
            near = difflib.get_close_matches(name, fields | foreign.names, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{cls.__name__} has no argument {name!r}{hint}")
    if ignored:
        warnings.warn(
            f"{cls.__name__}: without effect in jaxtune, ignored: {', '.join(ignored)}", stacklevel=3
        )
    return own


def check_types(config: Any) -> None:
    """Raise unless every field of type bool, int, float or Literal (or None) holds such a value."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        kinds = _members(field.type)
        choices = [choice for kind in kinds for choice in get_args(kind) if get_origin(kind) is Literal]
        if (value is None and type(None) in kinds) or (isinstance(value, bool) and bool in kinds):
            continue
        is_number = int in kinds and isinstance(value, int) and not isinstance(value, bool)
        if choices and value not in choices and not is_number and not set(map(get_origin, kinds)) & {tuple}:
            expected = ", ".join([*map(repr, choices), *(["a number"] if int in kinds else [])])
            raise ValueError(f"{field.name}={value!r} is not supported; expected one of {expected}")
        if str in kinds or choices or not set(kinds) & {bool, int, float}:
            continue
        number = numbers.Real if float in kinds else numbers.Integral if int in kinds else ()
        if isinstance(value, bool) or not isinstance(value, number) or not math.isfinite(value):
            expected = " or ".join(kind.__name__ for kind in kinds)
            hint = ' (YAML reads "2e-4" as text; write 2.0e-4)' if number and isinstance(value, str) else ""
            raise TypeError(f"{field.name} must be {expected}, got {value!r}{hint}")


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def check_memory(settings: Any) -> None:
    """Raises ValueError where they say two things about what the backward pass keeps."""
    if settings.memory_budget_gb is not None and not settings.memory_budget_gb > 0:
        raise ValueError(
            f"memory_budget_gb must be above 0, got {settings.memory_budget_gb!r}; expected GB of each device's "
            "memory, or None for what is free"
        )
    if settings.memory_budget_gb is not None and settings.remat != "auto":
        raise ValueError(
            f"memory_budget_gb={settings.memory_budget_gb!r} is what remat='auto' stays under, and remat is "
            f"{settings.remat!r}; leave out one of them"
        )
    if not settings.gradient_checkpointing and (
        settings.remat not in ("auto", "none") or settings.memory_budget_gb is not None
    ):
        raise ValueError(
            f"gradient_checkpointing=False keeps everything for the backward pass, and remat={settings.remat!r}, "
            f"memory_budget_gb={settings.memory_budget_gb!r} ask otherwise; leave out one or the other"
        )


def check_at_least(config: Any, least: int, names: Iterable[str]) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value!r}")


FOREIGN = ForeignNames(
    aliases={"evaluation_strategy": "eval_strategy"},
    ignored=frozenset(
        """
    accelerator_config average_tokens_across_devices batch_eval_metrics bf16 bf16_backend
    bf16_full_eval data_parallel_backend dataloader_in_order dataloader_multiprocessing_context
    dataloader_persistent_workers dataloader_pin_memory
    dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers
    ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed
    disable_log_stats do_eval do_predict do_train enable_jit_checkpoint eval_accumulation_steps
    eval_do_concat_batches eval_use_gather_object fp16 fp16_backend fp16_full_eval fp16_opt_level
    fsdp fsdp_config full_determinism gradient_checkpointing_kwargs half_precision_backend
    hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token
    include_for_metrics include_inputs_for_metrics include_num_input_tokens_seen
    include_tokens_per_second jit_mode_eval label_names length_column_name liger_kernel_config
    local_rank log_level log_level_replica log_on_each_node logging_nan_inf_filter
    overwrite_output_dir pad_to_multiple_of parallelism_config prediction_loss_only
    project ray_scope remove_unused_columns restore_callback_states_from_checkpoint
    save_on_each_node save_safetensors skip_memory_metrics tf32 torch_compile torch_compile_backend
    torch_compile_mode torch_empty_cache_steps torchdynamo trackio_bucket_id trackio_space_id
    trackio_static_space_id trust_remote_code use_cache use_liger use_liger_kernel use_mps_device
    """.split()
    ),
    refused={
        "compute_dtype": (None, "give it to FastLanguageModel.from_pretrained"),
        "adafactor": (False, "use optim='adamw' or 'adamw_8bit'"),
        "auto_find_batch_size": (False, "set per_device_train_batch_size"),
        "eval_delay": (0, "use eval_steps"),
        "greater_is_better": (None, "load_best_model_at_end is not there"),
        "ignore_data_skip": (False, "resuming goes on at the exact row, at no cost"),
        "label_smoothing_factor": (0.0, "leave it out"),
        "lr_scheduler_kwargs": ({}, "pick one of lr_scheduler_type's values"),
        "metric_for_best_model": (None, "load_best_model_at_end is not there"),
        "model_init_kwargs": ({}, "give them to FastLanguageModel.from_pretrained"),
        "no_cuda": (False, "set the environment variable JAX_PLATFORMS=cpu before Python starts"),
        "optim_args": (None, "use adam_beta1, adam_beta2, adam_epsilon"),
        "optim_target_modules": (None, "use optim='adamw_8bit' to save memory"),
        "push_to_hub": (False, "call model.push_to_hub after training"),
        "q_galore_config": (None, "use optim='adamw_8bit' to save memory"),
        "router_aux_loss_coef": (0.0, "mixture-of-experts models are not there yet"),
        "save_only_model": (
            False,
            "each checkpoint folder is a PEFT adapter already; delete its 'state' to save space",
        ),
        "use_cpu": (False, "set the environment variable JAX_PLATFORMS=cpu before Python starts"),
    },
)
