"""The familiar face: `FastLanguageModel` and `FastModel`, with Unsloth's names and defaults."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import gpu_memory, hub, images, lora, models
from jaxtune.arguments import sort_out
from jaxtune.compile_cache import enable_compile_cache
from jaxtune.config import LORA_TARGETS
from jaxtune.devices import Choice, Layout, make_layout
from jaxtune.kernels import target
from jaxtune.kernels.fp8 import NEEDS as FP8_NEEDS
from jaxtune.load import load_weights
from jaxtune.lora import LoraConfig
from jaxtune.model import Model
from jaxtune.models.decoder import CausalLM
from jaxtune.models.names import leaf_shapes
from jaxtune.models.rope import parameters_of
from jaxtune.models.vision_lm import VisionLM

DTYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32}
# Arguments of Unsloth that have no meaning here, with the values that ask for nothing.
_IGNORED = """device_map fast_inference fix_tokenizer use_exact_model_name offload_embedding
    float32_mixed_precision gpu_memory_utilization float8_kv_cache max_lora_rank disable_log_stats
    unsloth_tiled_mlp random_state return_logits fullgraph auto_model unsloth_force_compile
    attn_implementation force_download""".split()
_REFUSED = {
    "load_in_8bit": False,
    "load_in_fp8": False,
    "trust_remote_code": False,
    "qat_scheme": None,
    "resize_model_vocab": None,
    "quantization_config": None,
}
_PEFT_IGNORED = """max_seq_length temporary_location use_gradient_checkpointing task_type inference_mode
    ensure_weight_tying""".split()
_PEFT_REFUSED = {
    "bias": "none",
    "layers_pattern": None,
    "loftq_config": {},
    "qat_scheme": None,
    "target_parameters": None,
    "finetune_last_n_layers": None,
    "finetune_audio_layers": False,
}


def is_bfloat16_supported() -> bool:
    """Whether this device computes in bfloat16: every one but NVIDIA GPUs before Ampere."""
    device = jax.devices()[0]
    return device.platform != "gpu" or float(getattr(device, "compute_capability", "8.0")) >= 8.0


is_bf16_supported = is_bfloat16_supported  # Unsloth has both names


def as_dtype(dtype) -> Any:
    """None (bfloat16 on an accelerator, float32 on a CPU), a name, or a numpy, JAX or torch dtype -> JAX dtype."""
    if dtype is None:
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    name = str(getattr(dtype, "__name__", dtype)).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)} or None, got {dtype!r}")
    return DTYPES[name]


def side_of(checkpoint: hub.Checkpoint, text_only: bool) -> hub.Checkpoint:
    """A checkpoint under the names of `models`, or with text_only the text model in it."""
    checkpoint = checkpoint.renamed(models.renames(checkpoint.config))
    part = models.text_side_of(checkpoint.config) if text_only else None
    return checkpoint if part is None else checkpoint.text_part(*part)


def in_fp8(compute_dtype: str | None, dtype, *, nf4: bool) -> bool:
    """Whether products with frozen weights are taken in 8-bit floats.

    Raises:
      ValueError: an unknown compute_dtype, or fp8 with weights, a dtype or a GPU that it does not go with.
    """
    if compute_dtype is None:
        return False
    if compute_dtype != "fp8":
        raise ValueError(
            f"compute_dtype={compute_dtype!r} is not supported; expected 'fp8', or None for all in dtype"
        )
    if not nf4:
        raise ValueError(
            'compute_dtype="fp8" multiplies by NF4 weights; load the model with load_in_4bit=True'
        )
    if dtype == jnp.float16:
        raise ValueError('compute_dtype="fp8" needs dtype="bfloat16" or "float32", got float16')
    found = target.capability()
    if found is not None and found < FP8_NEEDS:
        raise ValueError(
            f'compute_dtype="fp8" needs a GPU of compute capability {FP8_NEEDS[0]}.{FP8_NEEDS[1]} or later (as H100, '
            f"L4, RTX 40), this one has {found[0]}.{found[1]}; leave it out"
        )
    return True


def layout_for(module: CausalLM, devices: int | None, data: Choice, fsdp: Choice) -> Layout:
    """How a model, still shapes, is to lie on devices; see devices.make_layout."""
    if devices is None and (data, fsdp) == ("auto", "auto") and isinstance(module, VisionLM):
        devices = 1  # rows with images do not train on several
    nbytes = sum(shape.size * shape.dtype.itemsize for shape in leaf_shapes(module).values())
    return make_layout(nbytes, devices, data, fsdp)


def _stretch(config, max_seq_length: int) -> None:
    """Makes room for `max_seq_length` tokens in a decoder's config: linear RoPE scaling, or the native scaling's window
    widened. Layers with a RoPE of their own keep it: they see a window."""
    native = config.max_position_embeddings
    if max_seq_length <= native:
        return
    parameters = parameters_of(config)
    if parameters["rope_type"] == "default":
        parameters.update(rope_type="linear", factor=max_seq_length / native)
        warnings.warn(
            f"max_seq_length={max_seq_length} is longer than the model's {native} tokens: RoPE is scaled linearly by "
            f"{max_seq_length / native:g}",
            stacklevel=4,
        )
    elif parameters["rope_type"] in ("llama3", "yarn"):
        config.max_position_embeddings = max_seq_length  # the native scaling is kept, its window widened


def _plain_modules(checkpoint) -> frozenset[str]:
    """Linear modules that a bitsandbytes checkpoint left in 16 bits."""
    if checkpoint.kind != "bnb-4bit":
        return frozenset()
    weights = (n for n in checkpoint.names() if n.endswith(".weight"))
    return frozenset(n.removesuffix(".weight") for n in weights if checkpoint.info(n).dtype != np.uint8)


class FastLanguageModel:
    """Loads a language model and puts an adapter on it, with Unsloth's names."""

    @staticmethod
    def from_pretrained(
        model_name: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
        max_seq_length: int | None = 2048,
        dtype=None,
        load_in_4bit: bool | None = None,
        load_in_16bit: bool = False,
        full_finetuning: bool = False,
        token: str | None = None,
        rope_scaling: dict | None = None,
        revision: str | None = None,
        use_gradient_checkpointing: bool | str = "unsloth",
        local_files_only: bool = False,
        cache_dir: str | None = None,
        gguf_file: str | None = None,
        compute_dtype: str | None = None,
        text_only: bool = False,
        devices: int | None = None,
        data: Choice = "auto",
        fsdp: Choice = "auto",
        **kwargs,
    ) -> tuple[Model, Any]:
        """Loads a checkpoint, its linear layers into NF4 unless told otherwise.

        Args:
          model_name: hub id, folder, bitsandbytes-4bit folder, .gguf file, or PEFT adapter (training goes on).
          max_seq_length: tokens; beyond the model's own, RoPE is scaled linearly (llama3 and yarn keep theirs). None:
            the model's own.
          dtype: compute dtype; None is bfloat16 on an accelerator and float32 on a CPU.
          compute_dtype: "fp8" multiplies by the NF4 weights in 8-bit floats, forward and for the input's gradient;
            adapter, attention and loss stay in dtype. Fewer than kernels.linear.FEW_ROWS tokens, as in generation,
            do not take part.
          load_in_4bit, load_in_16bit, full_finetuning: NF4 (the default), 16-bit LoRA, or every weight trained.
          text_only: of a vision-language model its text model alone, without tower and processor. Merged folders and
            GGUF are that text model's; adapters fit the whole model too.
          rope_scaling: replaces the config's.
          use_gradient_checkpointing: False keeps every activation; else SFTConfig.remat says what is kept.
          devices, data, fsdp: how many devices train, and how the frozen weights lie on them; see devices.make_layout.
          kwargs: Unsloth's others; those without meaning here warn, those that would change the result raise.

        Returns:
          (model, tokenizer), of a vision-language model (model, processor).
        """
        sort_out("from_pretrained", kwargs, _IGNORED, _REFUSED)
        gpu_memory.claim()
        enable_compile_cache()
        modes = {
            "load_in_4bit": load_in_4bit,
            "load_in_16bit": load_in_16bit,
            "full_finetuning": full_finetuning,
        }
        chosen = [name for name, value in modes.items() if value]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other; set one")
        nf4 = load_in_4bit is not False and chosen in ([], ["load_in_4bit"])
        fp8 = in_fp8(compute_dtype, as_dtype(dtype), nf4=nf4)
        checkpoint = hub.resolve(
            model_name, revision=revision, token=token, local_files_only=local_files_only, cache_dir=cache_dir,
            gguf_file=gguf_file,
        )  # fmt: skip
        checkpoint = side_of(checkpoint, text_only)
        config = checkpoint.config
        text = config.get_text_config()
        if rope_scaling is not None:
            scaling = dict(rope_scaling)
            kind = scaling.pop("rope_type", scaling.pop("type", "default"))
            parameters_of(text).update(rope_type=kind, **scaling)
        if max_seq_length is None:
            max_seq_length = text.max_position_embeddings
        _stretch(text, max_seq_length)
        nested = getattr(config, "quantization_config", None) or {"bnb_4bit_use_double_quant": True}
        double_quant = bool(nested.get("bnb_4bit_use_double_quant", False))
        dense = _plain_modules(checkpoint)

        def recipe():
            return models.build(
                config, as_dtype(dtype), nf4=nf4, double_quant=double_quant, dense=dense, fp8=fp8 and nf4
            )

        module = recipe()
        layout = layout_for(module, devices, data, fsdp)
        if full_finetuning and layout.fsdp > 1:
            raise ValueError(
                f"fsdp={layout.fsdp} splits frozen weights; full_finetuning has none, set fsdp=1"
            )
        leaves = load_weights(checkpoint, module, layout=layout)
        processor = None if images.family(config) is None else checkpoint.processor()
        tokenizer = checkpoint.tokenizer() if processor is None else processor.tokenizer
        model = Model(
            module,
            {},
            leaves,
            checkpoint=checkpoint,
            tokenizer=tokenizer,
            processor=processor,
            max_seq_length=max_seq_length,
            recipe=recipe,
            layout=layout,
        )
        model.gradient_checkpointing = bool(use_gradient_checkpointing)
        if full_finetuning:
            lora.train_everything(module)
            model.trainable = {path: leaf.astype(jnp.float32) for path, leaf in leaves.items()}
            model.base, model.full_finetuning = {}, True
            model.resplit()
        if checkpoint.adapter is not None:
            adapter, tensors = lora.read_adapter(checkpoint.adapter, checkpoint.text_side)
            model = _with_adapter(model, adapter)
            model.trainable = lora.adapter_leaves(model, tensors)
        return model, processor or tokenizer

    @staticmethod
    def get_peft_model(
        model: Model,
        r: int = 16,
        target_modules: Sequence[str] | str | None = LORA_TARGETS,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        layers_to_transform: Sequence[int] | int | None = None,
        random_state: int = 3407,
        use_rslora: bool = False,
        use_dora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        finetune_vision_layers: bool = False,
        finetune_language_layers: bool = True,
        finetune_attention_modules: bool = True,
        finetune_mlp_modules: bool = True,
        **kwargs,
    ) -> Model:
        """Puts a LoRA adapter on a model; see `lora.LoraConfig` for the arguments, and FastModel for those of vision.

        embed_tokens and lm_head among the target_modules are trained whole, as modules_to_save. A model that has the
        same adapter already is returned with a warning; one with another adapter raises TypeError.
        """
        if "use_gradient_checkpointing" in kwargs:
            model.gradient_checkpointing = bool(kwargs.pop("use_gradient_checkpointing"))
        sort_out("get_peft_model", kwargs, _PEFT_IGNORED, _PEFT_REFUSED)
        if model.full_finetuning:
            warnings.warn("full_finetuning trains every weight; get_peft_model does nothing", stacklevel=2)
            return model
        targets, saved = target_modules, list(modules_to_save or ())
        if targets is not None:
            lora.check_targets(targets)
        if targets is not None and not isinstance(targets, str):
            saved += [t for t in targets if t in lora.SAVABLE and t not in saved]
            targets = tuple(t for t in targets if t not in lora.SAVABLE)
        parts = {
            "vision": finetune_vision_layers,
            "language": finetune_language_layers,
            "attention": finetune_attention_modules,
            "mlp": finetune_mlp_modules,
        }
        sees = images.family(model.config) is not None
        given, targets = targets, lora.chosen_targets(model.module, targets, sees=sees, **parts)
        if targets is not given and layers_to_transform is not None:  # which goes with names only
            targets = tuple(sorted(lora.target_names(model.module, LoraConfig(target_modules=targets))))
        alone = isinstance(layers_to_transform, (int, str))
        layers = [layers_to_transform] if alone else layers_to_transform
        config = LoraConfig(
            r, lora_alpha, targets, lora_dropout, use_rslora, use_dora, init_lora_weights,
            None if layers is None else tuple(layers), tuple(saved), random_state,
        )  # fmt: skip
        if model.lora is not None:
            same = replace(model.lora, random_state=random_state, init_lora_weights=init_lora_weights)
            config = lora.named(model.module, config)
            if lora.target_names(model.module, same) == lora.target_names(model.module, config):
                spelt = {
                    "target_modules": config.target_modules,
                    "layers_to_transform": config.layers_to_transform,
                }
                same = replace(same, **spelt)
            if same != config:
                raise TypeError(f"the model already has another adapter: {model.lora}; load the base again")
            warnings.warn("the model already has this adapter; it is kept", stacklevel=2)
            return model
        return _with_adapter(model, config)

    @staticmethod
    def for_inference(model: Model) -> Model:
        """See Model.for_inference."""
        return model.for_inference()

    @staticmethod
    def for_training(model: Model, use_gradient_checkpointing: bool | str = True) -> Model:
        """See Model.for_training."""
        model.gradient_checkpointing = bool(use_gradient_checkpointing)
        return model.for_training()


def _with_adapter(model: Model, config: LoraConfig) -> Model:
    """A new handle with an adapter on the same base leaves."""
    module = model._recipe()
    config = lora.named(module, config)
    names = lora.attach(module, config)
    trainable, base = lora.initialise(module, model.base, config, names)
    put = model.layout.put_leaves
    adapted = Model(
        module, put(module, trainable), put(module, base), checkpoint=model.checkpoint, tokenizer=model.tokenizer,
        max_seq_length=model.max_seq_length, recipe=model._recipe, processor=model.processor, layout=model.layout,
    )  # fmt: skip
    adapted.lora, adapted.gradient_checkpointing = config, model.gradient_checkpointing
    return adapted


class FastModel(FastLanguageModel):
    """Loads text or vision-language models, by their config.json; puts adapters on all of their parts."""

    @staticmethod
    def from_pretrained(
        model_name: str = "unsloth/Llama-3.2-11B-Vision-Instruct-bnb-4bit", *args, **kwargs
    ) -> tuple[Model, Any]:
        """See FastLanguageModel.from_pretrained; by default a vision-language model."""
        return FastLanguageModel.from_pretrained(model_name, *args, **kwargs)

    @staticmethod
    def get_peft_model(
        model: Model,
        r: int = 16,
        target_modules: Sequence[str] | str | None = None,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        layers_to_transform: Sequence[int] | int | None = None,
        random_state: int = 3407,
        use_rslora: bool = False,
        use_dora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        finetune_vision_layers: bool = True,
        finetune_language_layers: bool = True,
        finetune_attention_modules: bool = True,
        finetune_mlp_modules: bool = True,
        **kwargs,
    ) -> Model:
        """Puts a LoRA adapter on the parts of a model that are to be trained.

        Args:
          target_modules: None: the linear layers of attention and MLPs, which "all-linear" means too, whatever the
            following say. Names are looked for in the parts that are trained only.
          finetune_vision_layers, finetune_language_layers: the tower, the decoder.
          finetune_attention_modules, finetune_mlp_modules: of each.
          The others: see FastLanguageModel.get_peft_model.
        """
        return FastLanguageModel.get_peft_model(
            model, r, target_modules, lora_alpha, lora_dropout, layers_to_transform, random_state, use_rslora,
            use_dora, modules_to_save, init_lora_weights, finetune_vision_layers, finetune_language_layers,
            finetune_attention_modules, finetune_mlp_modules, **kwargs,
        )  # fmt: skip


class FastVisionModel(FastModel):
    """`FastModel` under the name of Unsloth's vision notebooks."""
