"""Configuration: frozen dataclasses, one per stage, with the names and defaults of TRL and Unsloth.

The command line and the YAML file of `python -m jaxtune.train` are generated from these classes; the
line below each field is its help text. A config never changes once made: use `dataclasses.replace`.
Names that TRL's users may pass and that are no fields: see `settings`.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from jaxtune.settings import FOREIGN, ForeignNames, check_at_least, check_memory, check_types, tolerant

Strategy = Literal["no", "steps", "epoch"]
Event = Literal["logging", "eval", "save"]
REPORTERS = ("tensorboard", "wandb", "trackio")
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Hugging Face's names of the same optimizer on different machines, folded into the two that exist here.
OPTIMIZERS = {
    **dict.fromkeys(("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "paged_adamw_32bit"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), "adamw_8bit"),
}


_POSITIVE = """per_device_train_batch_size gradient_accumulation_steps per_device_eval_batch_size
    save_total_limit""".split()
_NOT_NEGATIVE = """warmup_steps warmup_ratio weight_decay max_grad_norm learning_rate embedding_learning_rate
    seed data_seed adam_epsilon adam_beta1 adam_beta2 logging_steps eval_steps save_steps""".split()


# What a layer can keep for the backward pass, by name (see models.remat).
KEEPABLE = ("attention", "qkv", "residual", "gate_up")


def remat_parts(text: str) -> tuple[frozenset[str], bool]:
    """ "attention+gate_up+offload" -> (the names to keep, whether layer inputs go to the host).

    Raises:
      TypeError: not a text.
      ValueError: an unknown name, or one to keep beside "all".
    """
    if not isinstance(text, str):
        raise TypeError(
            f"remat must be a text, got {text!r}; expected 'auto', 'all' (recompute everything), 'none' (keep "
            f"everything), or names to keep joined by '+': {', '.join(KEEPABLE)}, offload"
        )
    parts = [part.strip() for part in text.split("+")]
    for part in parts:
        if part not in (*KEEPABLE, "all", "none", "offload"):
            raise ValueError(
                f"remat={text!r}: {part!r} is unknown; expected 'auto', 'all' (recompute everything), 'none' (keep "
                f"everything), or names to keep joined by '+': {', '.join(KEEPABLE)}, offload"
            )
    names = KEEPABLE if "none" in parts else tuple(part for part in parts if part in KEEPABLE)
    if "all" in parts and names:
        raise ValueError(f"remat={text!r}: 'all' recomputes everything, so nothing can be kept beside it")
    return frozenset(names), "offload" in parts


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """What every trainer has: batches and length of the run, optimizer, logging, evaluation, checkpoints."""

    FOREIGN: ClassVar[ForeignNames] = FOREIGN
    # What may differ between a checkpoint and the run that resumes it, because the result does not depend on it. The
    # length of the run and the warm-up count as numbers of steps, see checkpoint.fingerprint.
    FREE_SETTINGS: ClassVar[frozenset[str]] = frozenset(
        """output_dir logging_strategy logging_steps logging_first_step report_to run_name logging_dir
        disable_tqdm eval_strategy eval_steps eval_on_start per_device_eval_batch_size
        save_strategy save_steps save_total_limit load_best_model_at_end resume_from_checkpoint
        gradient_checkpointing num_train_epochs max_steps warmup_steps warmup_ratio""".split()
    )

    output_dir: str = "trainer_output"
    """Folder for checkpoints, history.jsonl, the loss curve and the saved model."""

    # -- batch and length of the run ---------------------------------------------------------------
    per_device_train_batch_size: int = 8
    """Rows in one forward pass of one device."""
    gradient_accumulation_steps: int = 1
    """Forward passes in one optimizer step, which is that of one batch of all their rows, on all devices."""
    per_device_eval_batch_size: int = 8
    """Rows in one forward pass of the evaluation on one device."""
    num_train_epochs: float = 3.0
    """Passes over the data (not used when max_steps is above 0)."""
    max_steps: int = -1
    """Optimizer steps; above 0 it overrides num_train_epochs."""

    # -- optimizer ---------------------------------------------------------------------------------
    learning_rate: float = 2e-5
    """Peak learning rate (LoRA usually wants ten times what full fine-tuning does)."""
    embedding_learning_rate: float | None = None
    """Learning rate of embed_tokens and lm_head when they are trained. None = learning_rate."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Course of the learning rate after warm-up."""
    warmup_steps: float = 0
    """Steps of linear warm-up; below 1 a share of all steps."""
    warmup_ratio: float = 0.0
    """Share of all steps spent in warm-up (when warmup_steps is 0)."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    adam_beta1: float = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: float = 0.999
    """Decay of Adam's second moment."""
    adam_epsilon: float = 1e-8
    """Adam's epsilon."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; 0 = not clipped."""
    optim: str = "adamw"
    """adamw (float32 moments; also adamw_torch, adamw_torch_fused) or adamw_8bit (8-bit moments)."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass where memory asks for it (see remat; "unsloth" is the same here);
    False: never."""
    remat: str = "auto"
    """What the backward pass keeps: auto (the fastest that fits), all (recompute everything), none (keep everything),
    or names to keep joined by +: attention, qkv, residual, gate_up; +offload puts layer inputs and those, but for
    gate_up, into host memory."""
    memory_budget_gb: float | None = None
    """Device memory that remat=auto stays under. None = what is free."""
    seed: int = 42
    """Seed of dropout and noise."""
    data_seed: int | None = None
    """Seed of the order of the data. None = seed."""

    # -- logging -----------------------------------------------------------------------------------
    logging_strategy: Strategy = "steps"
    """When to log: never, every logging_steps, or once an epoch."""
    logging_steps: float = 10
    """Optimizer steps between two logs; below 1 a share of all steps."""
    logging_first_step: bool = False
    """Log the first step too."""
    report_to: str | tuple[str, ...] = ()
    """Besides history.jsonl: any of tensorboard, wandb, trackio; none by default."""
    run_name: str | None = None
    """Name of the run in those. None = the name of output_dir."""
    logging_dir: str | None = None
    """Folder of the TensorBoard files. None = output_dir/runs."""
    disable_tqdm: bool | None = None
    """No progress bar. None = shown."""

    # -- evaluation --------------------------------------------------------------------------------
    eval_strategy: Strategy = "no"
    """When to evaluate: never, every eval_steps, or once an epoch."""
    eval_steps: float | None = None
    """Optimizer steps between two evaluations; below 1 a share of all steps. None = logging_steps."""
    eval_on_start: bool = False
    """Evaluate before the first step too."""

    # -- checkpoints -------------------------------------------------------------------------------
    save_strategy: Strategy = "steps"
    """When to save: never, every save_steps and at the end, or once an epoch."""
    save_steps: float = 500
    """Optimizer steps between two checkpoints; below 1 a share of all steps."""
    save_total_limit: int | None = None
    """Keep this many checkpoints, the newest. None = all."""
    load_best_model_at_end: bool = False
    """Not supported: True raises."""
    resume_from_checkpoint: str | bool | None = None
    """Checkpoint folder to go on from, or true for the newest in output_dir (train() may override)."""

    def __post_init__(self) -> None:
        self._normalise()
        check_types(self)
        if self.remat != "auto":
            remat_parts(self.remat)
        check_at_least(self, 1, _POSITIVE)
        check_at_least(self, 0, _NOT_NEGATIVE)
        check_memory(self)
        if self.optim not in OPTIMIZERS:
            raise ValueError(
                f"optim={self.optim!r} is not supported; expected one of {', '.join(OPTIMIZERS)}"
            )
        for name in ("warmup_ratio", "adam_beta1", "adam_beta2"):
            if not getattr(self, name) < 1:
                raise ValueError(f"{name} must be below 1, got {getattr(self, name)!r}")
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ValueError(
                f"nothing to train: max_steps is {self.max_steps} and num_train_epochs "
                f"{self.num_train_epochs}; set one of them above 0"
            )
        for name in self.report_to:
            if name not in REPORTERS:
                raise ValueError(f"report_to={name!r}: expected some of {', '.join(REPORTERS)}, or 'none'")
        if self.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end=True is not supported; set save_steps = eval_steps, leave "
                "save_total_limit at None and load the checkpoint with the lowest eval_loss in history.jsonl"
            )

    @classmethod
    def translated(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Constructor arguments, those that stand for several fields taken apart."""
        return dict(given)

    def _normalise(self) -> None:
        """Fold equal spellings into one: enums to strings, optimizer names, report_to to a tuple."""
        put = functools.partial(object.__setattr__, self)
        for name in ("logging_strategy", "eval_strategy", "save_strategy", "lr_scheduler_type", "optim"):
            value = getattr(self, name)
            put(name, getattr(value, "value", value))
        put("optim", OPTIMIZERS.get(self.optim, self.optim))
        names = (self.report_to,) if isinstance(self.report_to, str) else tuple(self.report_to or ())
        put("report_to", tuple(name for name in names if name != "none"))
        if self.gradient_checkpointing == "unsloth":
            put("gradient_checkpointing", True)

    def batch_shape(self, devices: int) -> tuple[int, int, int]:
        """(micro-batches, rows of each on all devices, rows of a step, which may be fewer) of an optimizer step."""
        rows, steps = self.per_device_train_batch_size * devices, self.gradient_accumulation_steps
        return steps, rows, steps * rows

    def num_warmup_steps(self, num_steps: int) -> int:
        """Steps of warm-up in a run of num_steps optimizer steps (Hugging Face's rounding)."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil(num_steps * (self.warmup_steps or self.warmup_ratio))

    def interval(self, kind: Event, num_steps: int) -> int:
        """Optimizer steps between two logs, evaluations or checkpoints; 0 = not by steps."""
        if getattr(self, f"{kind}_strategy") != "steps":
            return 0
        value = (self.eval_steps or self.logging_steps) if kind == "eval" else getattr(self, f"{kind}_steps")
        return math.ceil(num_steps * value) if value < 1 else int(value)


@tolerant
@dataclasses.dataclass(frozen=True)
class SFTConfig(TrainingConfig):
    """Supervised fine-tuning, with TRL's defaults: data preparation, and what TrainingConfig has."""

    FOREIGN: ClassVar[ForeignNames] = FOREIGN.extended(
        aliases={"max_seq_length": "max_length"},
        ignored="activation_checkpointing activation_checkpointing_kwargs activation_offloading dataset_batch_size "
        "padding_free",
        refused={
            "dataloader_drop_last": (False, "the short last step is padded with empty rows instead"),
            "group_by_length": (False, "use packing=True"),
            "num_of_sequences": (1024, "that was for streamed packing; leave it out"),
            "pad_token": (None, "set tokenizer.pad_token"),
            "truncation_mode": ("keep_start", "sequences are cut on the right"),
        },
    )
    # What only decides the tokens counts through the digest of the data; of the batch its rows count, not how they are
    # divided among devices and micro-batches.
    FREE_SETTINGS: ClassVar[frozenset[str]] = TrainingConfig.FREE_SETTINGS | set(
        """per_device_train_batch_size gradient_accumulation_steps total_batch_size eval_packing dataset_num_proc
        dataset_text_field dataset_kwargs chat_template_path eos_token completion_only_loss
        assistant_only_loss shuffle_dataset dataloader_num_workers""".split()
    )

    total_batch_size: int | None = None
    """Rows in one optimizer step, whatever the number of devices; gradient_accumulation_steps then follows from it.
    None = per_device_train_batch_size × gradient_accumulation_steps × devices."""

    # -- data --------------------------------------------------------------------------------------
    max_length: int | None = 1024
    """Longest sequence in tokens, longer ones are cut on the right (None = not); with packing, row length."""
    packing: bool = False
    """Put several sequences into one row of max_length tokens; attention and positions stay apart."""
    packing_strategy: Literal["bfd", "bfd_split", "wrapped"] = "bfd"
    """bfd: best-fit decreasing, cuts overflow; bfd_split: splits overflow; wrapped: one stream cut up."""
    eval_packing: bool | None = None
    """Pack the evaluation data too. None = as packing."""
    completion_only_loss: bool | None = None
    """Train on the completion only. None = yes for prompt-completion data, no for other data."""
    assistant_only_loss: bool = False
    """Train on the assistant's turns only, found through the chat template."""
    dataset_text_field: str = "text"
    """Column that holds the text."""
    dataset_num_proc: int | None = None
    """Not needed: rows are tokenised in batches, on the tokenizer's own threads."""
    dataset_kwargs: dict[str, bool] | None = None
    """Only {"skip_prepare_dataset": true}: the data already has input_ids (and labels)."""
    eos_token: str | None = None
    """Token that ends a sequence. None = the tokenizer's."""
    chat_template_path: str | None = None
    """Jinja file, or tokenizer folder or repository, whose chat template replaces the tokenizer's."""
    shuffle_dataset: bool = False
    """Shuffle the rows once, before they are packed."""
    train_sampling_strategy: Literal["random", "sequential"] = "random"
    """Order of the rows in an epoch."""
    dataloader_num_workers: int = 0
    """Processes that open and process images ahead of the step. 0 = one for each core but one, 8 at most. Rows without
    images need none."""

    # -- objective ---------------------------------------------------------------------------------
    loss_type: Literal["nll"] = "nll"
    """Negative log-likelihood; the logits are never materialised."""
    neftune_noise_alpha: float | None = None
    """NEFTune: uniform noise of this strength on the embeddings while training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, ["max_length", "dataset_num_proc", "total_batch_size"])
        check_at_least(self, 0, ["neftune_noise_alpha", "dataloader_num_workers"])
        if self.packing and self.max_length is None:
            raise ValueError("packing=True needs max_length (the row length in tokens), got None")
        unknown = set(self.dataset_kwargs or ()) - {"skip_prepare_dataset"}
        if unknown:
            raise ValueError(f"dataset_kwargs knows only 'skip_prepare_dataset', got {sorted(unknown)}")

    def batch_shape(self, devices: int) -> tuple[int, int, int]:
        steps, height, rows = super().batch_shape(devices)
        if self.total_batch_size is None:
            return steps, height, rows
        return math.ceil(self.total_batch_size / height), height, self.total_batch_size

    def for_evaluation(self) -> "SFTConfig":
        """These settings for the evaluation data: in its own order, packed as `eval_packing` says."""
        packing = self.packing if self.eval_packing is None else self.eval_packing
        return dataclasses.replace(self, packing=packing, shuffle_dataset=False)

    def _normalise(self) -> None:
        super()._normalise()
        if self.loss_type == "chunked_nll":
            object.__setattr__(self, "loss_type", "nll")

    @property
    def max_seq_length(self) -> int | None:
        """Unsloth's name of max_length."""
        return self.max_length


@dataclasses.dataclass(frozen=True)
class LoadArguments:
    """The base model (arguments of FastLanguageModel.from_pretrained)."""

    model_name: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Hub id, local folder, .gguf file, or folder of a PEFT adapter to train on."""
    max_seq_length: int = 2048
    """Longest sequence in tokens; beyond the model's own length RoPE is stretched, with a warning."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Dtype of the computation. None = bfloat16 on an accelerator, float32 on a CPU."""
    compute_dtype: Literal["fp8"] | None = None
    """fp8: multiply by the NF4 weights in 8-bit floats, twice as fast on a GPU that has them (sm_89, as H100 and L4,
    or later); the adapter and the loss stay in dtype. None = all in dtype."""
    load_in_4bit: bool = True
    """Keep the frozen weights in NF4 (QLoRA)."""
    load_in_16bit: bool = False
    """Keep the frozen weights in dtype (LoRA); needs load_in_4bit false."""
    full_finetuning: bool = False
    """Train every weight, without LoRA; needs load_in_4bit false."""
    text_only: bool = False
    """Of a vision-language model its text model alone, without tower and processor."""
    revision: str | None = None
    """Branch, tag or commit of the repository."""
    token: str | None = dataclasses.field(default=None, repr=False)
    """Access token of the hub; never logged or saved."""
    local_files_only: bool = False
    """Never download; use what is in the cache."""
    cache_dir: str | None = None
    """Folder of downloaded files. None = the hub library's own."""
    devices: int | None = None
    """Devices to train on. None = all GPUs; one device of a CPU."""
    data: int | Literal["auto"] = "auto"
    """Copies of the frozen weights; data × fsdp = devices. auto: what fsdp leaves."""
    fsdp: int | Literal["auto"] = "auto"
    """Devices that share one copy of the frozen weights and gather each layer's when it is run. auto: 1 where the
    weights fit into one device, else as few as hold them."""

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(self, 1, ["max_seq_length", "devices"])
        check_at_least(self, 1, [name for name in ("data", "fsdp") if getattr(self, name) != "auto"])
        chosen = [
            name for name in ("load_in_4bit", "load_in_16bit", "full_finetuning") if getattr(self, name)
        ]
        if "load_in_4bit" in chosen and len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other; set load_in_4bit=False")
        if self.compute_dtype == "fp8" and chosen != ["load_in_4bit"]:
            raise ValueError('compute_dtype="fp8" multiplies by NF4 weights; set load_in_4bit=True alone')


@dataclasses.dataclass(frozen=True)
class ClusterArguments:
    """The processes of a run on several hosts. Under SLURM, MPI and Kubernetes nothing needs to be said."""

    coordinator: str | None = None
    """HOST:PORT of process 0, where the processes meet. None = as the launcher says, or this process is alone."""
    num_processes: int | None = None
    """How many there are. None = as the launcher says."""
    process_id: int | None = None
    """Which one this is, from 0. None = as the launcher says."""
    heartbeat_timeout: int = 60
    """Seconds after which a process that is silent is taken for lost, and the others end."""

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(self, 1, ["num_processes", "heartbeat_timeout"])
        check_at_least(self, 0, ["process_id"])
        if self.coordinator is None and (self.num_processes, self.process_id) != (None, None):
            raise ValueError("num_processes and process_id need a coordinator (HOST:PORT of process 0)")
        if self.coordinator is not None and ":" not in self.coordinator:
            raise ValueError(f"coordinator must be HOST:PORT, got {self.coordinator!r}")


@dataclasses.dataclass(frozen=True)
class LoraArguments:
    """The adapter (arguments of FastLanguageModel.get_peft_model)."""

    r: int = 16
    """Rank."""
    lora_alpha: float = 16
    """The adapter is scaled by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = LORA_TARGETS
    """Layers that get an adapter, by the last part of their name, or "all-linear"."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r)."""
    use_dora: bool = False
    """DoRA: train the magnitude of each output row too."""
    init_lora_weights: bool | Literal["gaussian"] = True
    """true: PEFT's default (A Kaiming-uniform, B zero); gaussian: A normal with deviation 1/r, B zero."""
    layers_to_transform: tuple[int, ...] | None = None
    """Numbers of the layers that get an adapter. None = all."""
    modules_to_save: tuple[str, ...] | None = None
    """Trained whole and saved with the adapter: embed_tokens, lm_head."""
    finetune_vision_layers: bool = True
    """Of a model that takes images: train its vision tower."""
    finetune_language_layers: bool = True
    """Train the decoder."""
    finetune_attention_modules: bool = True
    """Train the attention layers."""
    finetune_mlp_modules: bool = True
    """Train the MLP layers."""
    random_state: int = 3407
    """Seed of the initial adapter."""

    def __post_init__(self) -> None:
        for name in ("target_modules", "layers_to_transform", "modules_to_save"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, (value,) if isinstance(value, (str, int)) else tuple(value))
        if self.target_modules == ("all-linear",):
            object.__setattr__(self, "target_modules", "all-linear")
        check_types(self)
        check_at_least(self, 1, ["r"])
        check_at_least(self, 0, ["lora_alpha", "lora_dropout", "random_state"])
        if not self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be below 1, got {self.lora_dropout!r}")


@dataclasses.dataclass(frozen=True)
class DataSource:
    """Where the rows of a run come from, and the chat template that they are written in."""

    dataset: str | None = None
    """Hub name, or JSONL, JSON, CSV or Parquet file. None = the small task that ships with jaxtune."""
    dataset_config: str | None = None
    """Configuration (subset) of a hub dataset."""
    split: str = "train"
    """Split to train on, slices allowed ("train[:1000]")."""
    eval_dataset: str | None = None
    """Like dataset, for evaluation. None = eval_split of dataset when that is given."""
    eval_split: str | None = None
    """Split to evaluate on."""
    chat_template: str | None = None
    """Name of a known chat template ("llama-3.1", "chatml", …) to put in place of the tokenizer's."""
    system_message: str | None = None
    """System message of that template."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclasses.dataclass(frozen=True)
class DataArguments(DataSource):
    """The data of `python -m jaxtune.train`."""

    standardize_sharegpt: bool = True
    """Turn ShareGPT columns (conversations, from, value) into messages when they are found."""
    train_on_responses_only: bool = False
    """Mask everything but the assistant's answers."""
    image_instruction: str | None = None
    """Question that makes conversations of rows that are an image and a text, the text being the answer."""
    image_folder: str | None = None
    """Where relative paths of images are looked for besides the current folder. None = beside the data file."""
    resize: str = "min"
    """Images: min (no wider than the model's image_size, else 512 pixels), max (as they are), or a number of pixels."""
    too_long: Literal["drop", "raise"] = "drop"
    """Rows with images that are longer than max_length, which are never cut: leave them out, or stop."""
    instruction_part: str | None = None
    """Text that starts a user's turn. None = found from the chat template."""
    response_part: str | None = None
    """Text that starts an assistant's turn. None = found from the chat template."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.instruction_part is None) != (self.response_part is None):
            raise ValueError(
                "give both instruction_part and response_part, or neither (found from the template)"
            )
