"""The familiar face: `FastLanguageModel`, and the `Model` it returns, a handle on pure pytrees.

Everything that computes takes `model.graphdef`, `model.trainable` and `model.base`; the handle only keeps them
together with the config, the tokenizer and the checkpoint they came from.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune import hub, lora, models
from jaxtune.config import LORA_TARGETS
from jaxtune.generate import Sampling, generate
from jaxtune.load import load_weights
from jaxtune.lora import LoraConfig
from jaxtune.models.names import Leaves, Slot, join, linear_slots, module_slots
from jaxtune.quant import NF4, dequantize_nf4

DTYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32}
# Arguments of Unsloth that have no meaning here, with the values that ask for nothing.
_IGNORED = """device_map fix_tokenizer use_exact_model_name offload_embedding float32_mixed_precision
    gpu_memory_utilization float8_kv_cache max_lora_rank disable_log_stats unsloth_tiled_mlp random_state text_only
    return_logits fullgraph auto_model unsloth_force_compile attn_implementation force_download""".split()
_REFUSED = {
    "load_in_8bit": False,
    "load_in_fp8": False,
    "fast_inference": False,
    "trust_remote_code": False,
    "qat_scheme": None,
    "resize_model_vocab": None,
    "quantization_config": None,
}
_PEFT_IGNORED = """max_seq_length temporary_location use_gradient_checkpointing task_type inference_mode
    ensure_weight_tying finetune_language_layers finetune_attention_modules finetune_mlp_modules""".split()
_PEFT_REFUSED = {
    "bias": "none",
    "layers_pattern": None,
    "loftq_config": {},
    "qat_scheme": None,
    "target_parameters": None,
    "finetune_last_n_layers": None,
    "finetune_vision_layers": False,
    "finetune_audio_layers": False,
}


def _sort_out(
    where: str, given: Mapping[str, Any], ignored: Sequence[str], refused: Mapping[str, Any]
) -> None:
    """Raises for arguments that would change the result, warns once of those that mean nothing here."""
    unknown = given.keys() - set(ignored) - refused.keys()
    if unknown:
        raise TypeError(f"{where} got unknown arguments: {', '.join(sorted(unknown))}")
    for name, neutral in refused.items():
        if name in given and given[name] not in (neutral, None):
            raise NotImplementedError(f"{where}: {name}={given[name]!r} is not supported by jaxtune")
    idle = [name for name in given if name in ignored]
    if idle:
        warnings.warn(f"{where}: no effect in jaxtune: {', '.join(idle)}", stacklevel=3)


def as_dtype(dtype) -> Any:
    """None (bfloat16 on an accelerator, float32 on a CPU), a name, or a numpy, JAX or torch dtype -> JAX dtype."""
    if dtype is None:
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    name = str(getattr(dtype, "__name__", dtype)).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)} or None, got {dtype!r}")
    return DTYPES[name]


@partial(jax.jit, static_argnames="graphdef")
def _logits(graphdef, trainable, base, ids, positions, segment_ids):
    module = join(graphdef, trainable, base)
    hidden, _ = module.hidden(module.embed(ids), positions, segment_ids)
    return module.logits(hidden)


@partial(jax.jit, static_argnames="dtype")
def _dense_stack(stored: NF4, dtype) -> jax.Array:
    if stored.codes.ndim == 2:
        return dequantize_nf4(stored, dtype)
    return jax.lax.map(lambda one: dequantize_nf4(one, dtype), stored)


def dense_base(base: Leaves, dtype) -> Leaves:
    """A base whose NF4 weights are dequantised: four times the memory, for generation with many steps."""
    out = {}
    for path, leaf in base.items():
        owner, field = path.rsplit(".", 1)
        if field == "codes":
            out[owner] = _dense_stack(NF4(**{f: base.get(f"{owner}.{f}") for f in NF4._fields}), dtype)
        elif field not in NF4._fields:
            out[path] = leaf
    return out


class Model:
    """A language model: a graph definition, its trained leaves, its frozen leaves.

    Attributes:
      config: transformers' config. tokenizer, checkpoint (`hub.Checkpoint`), name_or_path: where it came from.
      graphdef, trainable, base: the split model; flat dicts path -> array.
      lora: LoraConfig, or None. dtype: of activations and unquantised frozen weights. max_seq_length: tokens.
      slots: checkpoint module name -> Slot(path, index).
      gradient_checkpointing: what the trainer does unless told otherwise.
    """

    def __init__(
        self, module, trainable: Leaves, base: Leaves, *, checkpoint, tokenizer, max_seq_length: int, recipe
    ):
        self.module, self.trainable, self.base = module, trainable, base
        self.checkpoint, self.tokenizer = checkpoint, tokenizer
        self.config, self.name_or_path = checkpoint.config, checkpoint.name_or_path
        self.max_seq_length, self.dtype = max_seq_length, module.dtype
        self.lora: LoraConfig | None = None
        self.full_finetuning = False
        self.gradient_checkpointing = True
        self._recipe = recipe
        self._dense: tuple[nnx.GraphDef, Leaves] | None = None
        self.resplit()

    def resplit(self) -> None:
        """Takes graphdef and slots from `module` again, after it has been changed."""
        self.graphdef = nnx.split(self.module)[0]
        self.slots: dict[str, Slot] = module_slots(self.module)

    def __repr__(self) -> str:
        trained = sum(leaf.size for leaf in self.trainable.values())
        return (
            f"Model({self.name_or_path!r}, {self.num_parameters():,} parameters, {trained:,} trained, "
            f"{self.memory_bytes() / 1e9:.2f} GB)"
        )

    def num_parameters(self) -> int:
        """Weights of the base model; a 4-bit weight counts as one."""
        return sum(int(np.prod(info.shape)) for info in map(self.checkpoint.info, self.checkpoint.names()))

    def num_trainable(self) -> int:
        """Trained weights."""
        return sum(leaf.size for leaf in self.trainable.values())

    def print_trainable_parameters(self) -> None:
        """Prints PEFT's line."""
        trained, total = self.num_trainable(), self.num_parameters() + self.num_trainable()
        print(
            f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}"
        )

    def memory_bytes(self) -> int:
        """Bytes of all leaves."""
        return sum(leaf.nbytes for leaf in (*self.base.values(), *self.trainable.values()))

    def logits(self, input_ids, attention_mask=None, positions=None, segment_ids=None) -> jax.Array:
        """float32 [B, T, V] of int [B, T] ids; attention_mask marks the tokens (either side may be padded)."""
        ids = jnp.asarray(_numpy(input_ids), jnp.int32)
        if segment_ids is None:
            segment_ids = (
                jnp.ones_like(ids)
                if attention_mask is None
                else jnp.asarray(_numpy(attention_mask), jnp.int32)
            )
        if positions is None:
            positions = jnp.maximum(jnp.cumsum(segment_ids, 1) - 1, 0)
        return _logits(self.graphdef, self.trainable, self.base, ids, positions, segment_ids)

    def for_inference(self) -> "Model":
        """Keeps a dequantised copy of the base, so that `generate` does not dequantise at every step."""
        if self._dense is None and any(path.endswith(".codes") for path in self.base):
            module = self._recipe(nf4=False)
            if self.lora is not None:
                lora.attach(module, self.lora)
            self._dense = nnx.split(module)[0], dense_base(self.base, self.dtype)
        return self

    def for_training(self) -> "Model":
        """Frees the copy of `for_inference`."""
        self._dense = None
        return self

    # Names that transformers' users call and that need nothing here.
    train = for_training

    def eval(self) -> "Model":
        """Does nothing: dropout is on in a training step only."""
        return self

    def generate(
        self,
        input_ids=None,
        attention_mask=None,
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        streamer=None,
        seed: int = 0,
        use_cache: bool = True,
        **sampling,
    ) -> np.ndarray:
        """Continues prompts, as transformers' `generate`.

        Args:
          input_ids: int [B, P] (numpy, JAX, torch or lists), padded on the left; or a string, or a list of strings.
          attention_mask: int [B, P]; without it everything but padding in front counts.
          max_new_tokens: most tokens to generate, 128 unless max_length (prompt included) says otherwise.
          eos_token_id: what ends a row; by default the generation config's and the tokenizer's.
          streamer: gets the prompt, then each token, then end(): a TextStreamer. One prompt only.
          seed: of the sampling.
          sampling: do_sample, temperature, top_k, top_p, min_p, repetition_penalty; defaults are the generation
            config's. Without do_sample the most likely token is taken.

        Returns:
          int32 [B, P + n], prompts included, padded after the end.
        """
        del use_cache
        pad = self._pad_id() if pad_token_id is None else pad_token_id
        ids, mask = self._prompts(input_ids, attention_mask, pad)
        if max_new_tokens is None:
            max_new_tokens = 128 if max_length is None else max_length - ids.shape[1]
        on_tokens = None
        if streamer is not None:
            streamer.put(ids)
            on_tokens = lambda tokens: [streamer.put(column) for column in tokens.T]  # noqa: E731
        self._warn_of_length(ids.shape[1] + max_new_tokens)
        temporary = self._dense is None and self._dense_fits()
        graphdef, base = self.for_inference()._dense if temporary and self._quantised() else self._weights()
        try:
            new = generate(
                graphdef,
                self.trainable,
                base,
                ids,
                mask,
                max_new_tokens=max_new_tokens,
                sampling=self._sampling(sampling),
                stop=self._stop_ids(eos_token_id),
                pad=pad,
                key=jax.random.key(seed),
                on_tokens=on_tokens,
            )
        finally:
            if temporary:
                self._dense = None
        if streamer is not None:
            streamer.end()
        return np.concatenate([ids, new], 1)

    def _quantised(self) -> bool:
        return any(path.endswith(".codes") for path in self.base)

    def _weights(self):
        return (self.graphdef, self.base) if self._dense is None else self._dense

    def _dense_fits(self) -> bool:
        """Whether a dequantised copy of the base fits beside what the device holds."""
        stats = jax.devices()[0].memory_stats()
        if not stats or "bytes_limit" not in stats:
            return True
        need = (
            2
            * sum(leaf.size for path, leaf in self.base.items() if path.endswith(".codes"))
            * self.dtype.dtype.itemsize
        )
        return need < 0.6 * (stats["bytes_limit"] - stats["bytes_in_use"])

    def _warn_of_length(self, length: int) -> None:
        if length > self.max_seq_length:
            warnings.warn(
                f"prompt and max_new_tokens make {length} tokens, max_seq_length is {self.max_seq_length}",
                stacklevel=3,
            )

    def _pad_id(self) -> int:
        for holder in (self.tokenizer, self.config):
            pad = getattr(holder, "pad_token_id", None)
            if pad is not None:
                return pad
        return 0

    def _prompts(self, input_ids, attention_mask, pad: int) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(input_ids, Mapping):
            input_ids, attention_mask = (
                input_ids["input_ids"],
                input_ids.get("attention_mask", attention_mask),
            )
        if isinstance(input_ids, str) or (
            isinstance(input_ids, (list, tuple)) and isinstance(input_ids[0], str)
        ):
            texts = [input_ids] if isinstance(input_ids, str) else list(input_ids)
            rows = [self.tokenizer(text)["input_ids"] for text in texts]
            width = max(map(len, rows))
            input_ids = np.array([[pad] * (width - len(row)) + row for row in rows])
            attention_mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        ids = np.atleast_2d(_numpy(input_ids)).astype(np.int32)
        if attention_mask is None:
            # padding in front only: a pad token inside or at the end of a prompt is a token
            attention_mask = np.maximum.accumulate(ids != pad, axis=1)
        return ids, np.atleast_2d(_numpy(attention_mask)).astype(np.int32)

    def _sampling(self, given: dict[str, Any]) -> Sampling:
        names = {"do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
        _sort_out(
            "generate",
            {k: v for k, v in given.items() if k not in names},
            ["cache_implementation"],
            {"num_beams": 1},
        )
        defaults = {
            k: v for k, v in self.checkpoint.generation_config.items() if k in names and v is not None
        }
        chosen = {"top_k": 50} | defaults | {k: v for k, v in given.items() if v is not None and k in names}
        if not chosen.get("do_sample") and given.keys() & (names - {"do_sample", "repetition_penalty"}):
            warnings.warn("sampling arguments have no effect without do_sample=True", stacklevel=3)
        if not chosen.get("do_sample"):
            chosen = {"repetition_penalty": chosen.get("repetition_penalty", 1.0)}
        return Sampling(**chosen)

    def _stop_ids(self, given) -> list[int]:
        sources = (
            [given]
            if given is not None
            else [
                self.checkpoint.generation_config.get("eos_token_id", self.config.eos_token_id),
                getattr(self.tokenizer, "eos_token_id", None),
            ]
        )
        ids: set[int] = set()
        for source in sources:
            ids |= set(source) if isinstance(source, (list, tuple)) else {source} - {None}
        return sorted(ids)

    def save_pretrained(self, directory: str | Path, **_) -> None:
        """Writes the adapter in PEFT's format, with the tokenizer; a fully fine-tuned model as 16-bit weights."""
        from jaxtune.export.adapter import save_adapter
        from jaxtune.export.merged import save_merged

        save = save_merged if self.full_finetuning else save_adapter
        save(self, directory)

    def save_pretrained_merged(
        self, directory: str | Path, tokenizer=None, save_method: str = "merged_16bit", **options
    ) -> None:
        """Writes adapter ("lora") or merged model ("merged_16bit", "merged_4bit"); see export.merged.save_merged."""
        from jaxtune.export.merged import save_merged

        save_merged(self, directory, tokenizer or self.tokenizer, save_method=save_method, **options)

    def push_to_hub(self, repo_id: str, **options) -> str:
        """Uploads the adapter; see export.upload.push_to_hub."""
        from jaxtune.export.upload import push_to_hub

        return push_to_hub(self, repo_id, **options)

    def push_to_hub_merged(
        self, repo_id: str, tokenizer=None, save_method: str = "merged_16bit", **options
    ) -> str:
        """Uploads a merged model; see export.upload.push_to_hub_merged."""
        from jaxtune.export.upload import push_to_hub_merged

        return push_to_hub_merged(
            self, repo_id, tokenizer or self.tokenizer, save_method=save_method, **options
        )


def _numpy(value) -> np.ndarray:
    """An array from numpy, JAX, lists, or a torch tensor on any device."""
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def _stretch(config, max_seq_length: int) -> None:
    """Makes room for `max_seq_length` tokens: linear RoPE scaling, or the native scaling's window widened."""
    config.standardize_rope_params()
    native = config.max_position_embeddings
    if max_seq_length <= native:
        return
    parameters = config.rope_parameters
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
        **kwargs,
    ) -> tuple[Model, Any]:
        """Loads a checkpoint, its linear layers into NF4 unless told otherwise.

        Args:
          model_name: hub id, folder, bitsandbytes-4bit folder, .gguf file, or PEFT adapter (training goes on).
          max_seq_length: tokens; beyond the model's own, RoPE is scaled linearly (llama3 and yarn keep theirs). None:
            the model's own.
          dtype: compute dtype; None is bfloat16 on an accelerator and float32 on a CPU.
          load_in_4bit, load_in_16bit, full_finetuning: NF4 (the default), 16-bit LoRA, or every weight trained.
          rope_scaling: replaces the config's.
          use_gradient_checkpointing: False keeps every activation; else the trainer recomputes layers.
          kwargs: Unsloth's others; those without meaning here warn, those that would change the result raise.

        Returns:
          (model, tokenizer).
        """
        _sort_out("from_pretrained", kwargs, _IGNORED, _REFUSED)
        modes = {
            "load_in_4bit": load_in_4bit,
            "load_in_16bit": load_in_16bit,
            "full_finetuning": full_finetuning,
        }
        chosen = [name for name, value in modes.items() if value]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other; set one")
        nf4 = load_in_4bit is not False and chosen in ([], ["load_in_4bit"])
        checkpoint = hub.resolve(
            model_name, revision=revision, token=token, local_files_only=local_files_only, cache_dir=cache_dir,
            gguf_file=gguf_file,
        )  # fmt: skip
        config = checkpoint.config
        if rope_scaling is not None:
            config.standardize_rope_params()
            scaling = dict(rope_scaling)
            config.rope_parameters |= {
                "rope_type": scaling.pop("rope_type", scaling.pop("type", "default")),
                **scaling,
            }
        if max_seq_length is None:
            max_seq_length = config.max_position_embeddings
        models.family(config)
        _stretch(config, max_seq_length)
        nested = getattr(config, "quantization_config", None) or {"bnb_4bit_use_double_quant": True}
        double_quant = bool(nested.get("bnb_4bit_use_double_quant", False))
        dense = _plain_modules(checkpoint)

        def recipe(nf4: bool):
            return models.build(config, as_dtype(dtype), nf4=nf4, double_quant=double_quant, dense=dense)

        module = recipe(nf4)
        leaves = load_weights(checkpoint, module)
        tokenizer = checkpoint.tokenizer()
        model = Model(
            module,
            {},
            leaves,
            checkpoint=checkpoint,
            tokenizer=tokenizer,
            max_seq_length=max_seq_length,
            recipe=recipe,
        )
        model.gradient_checkpointing = bool(use_gradient_checkpointing)
        if full_finetuning:
            lora.train_everything(module)
            model.trainable = {path: leaf.astype(jnp.float32) for path, leaf in leaves.items()}
            model.base, model.full_finetuning = {}, True
            model.resplit()
        if checkpoint.adapter is not None:
            adapter, tensors = lora.read_adapter(checkpoint.adapter)
            model = _with_adapter(model, adapter)
            model.trainable = lora.adapter_leaves(model, tensors)
        return model, tokenizer

    @staticmethod
    def get_peft_model(
        model: Model,
        r: int = 16,
        target_modules: Sequence[str] | str = LORA_TARGETS,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        layers_to_transform: Sequence[int] | int | None = None,
        random_state: int = 3407,
        use_rslora: bool = False,
        use_dora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        **kwargs,
    ) -> Model:
        """Puts a LoRA adapter on a model; see `lora.LoraConfig` for the arguments.

        embed_tokens and lm_head among the target_modules are trained whole, as modules_to_save. A model that has the
        same adapter already is returned with a warning; one with another adapter raises TypeError.
        """
        if "use_gradient_checkpointing" in kwargs:
            model.gradient_checkpointing = bool(kwargs.pop("use_gradient_checkpointing"))
        _sort_out("get_peft_model", kwargs, _PEFT_IGNORED, _PEFT_REFUSED)
        if model.full_finetuning:
            warnings.warn("full_finetuning trains every weight; get_peft_model does nothing", stacklevel=2)
            return model
        targets, saved = target_modules, list(modules_to_save or ())
        if not isinstance(targets, str):
            saved += [t for t in targets if t in lora.SAVABLE and t not in saved]
            targets = tuple(t for t in targets if t not in lora.SAVABLE)
        layers = [layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform
        config = LoraConfig(
            r, lora_alpha, targets, lora_dropout, use_rslora, use_dora, init_lora_weights,
            None if layers is None else tuple(layers), tuple(saved), random_state,
        )  # fmt: skip
        if model.lora is not None:
            same = replace(model.lora, random_state=random_state, init_lora_weights=init_lora_weights)
            config = lora.named(model.module, config)
            if set(same.target_modules) == set(config.target_modules):
                same = replace(same, target_modules=config.target_modules)
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
    module = model._recipe(nf4=model._quantised())
    config = lora.named(module, config)
    names = lora.attach(module, config)
    trainable, base = lora.initialise(module, model.base, config, names)
    adapted = Model(
        module, trainable, base, checkpoint=model.checkpoint, tokenizer=model.tokenizer,
        max_seq_length=model.max_seq_length, recipe=model._recipe,
    )  # fmt: skip
    adapted.lora, adapted.gradient_checkpointing = config, model.gradient_checkpointing
    return adapted


class FastModel(FastLanguageModel):
    """Loads text or vision models by their config.json; text families so far, others raise naming what exists."""


__all__ = ["FastLanguageModel", "FastModel", "Model", "linear_slots"]
