"""`Model`, what `FastLanguageModel` returns: a handle on pure pytrees.

Everything that computes takes `model.graphdef`, `model.trainable` and `model.base`; the handle only keeps them
together with the config, the tokenizer and the checkpoint they came from.
"""

import copy
import warnings
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune import images
from jaxtune.arguments import sort_out
from jaxtune.devices import ONE_DEVICE, Layout, device_bytes
from jaxtune.export import upload
from jaxtune.export.adapter import save_adapter
from jaxtune.export.merged import save_merged
from jaxtune.export.save_gguf import save_gguf, save_lora_gguf
from jaxtune.generate import Engine, Generations, LoRARequest, Sampling, SamplingParams, fast_generate
from jaxtune.generate.prompts import is_written, read_prompts, refuse_placeholders
from jaxtune.generate.requests import RequestOutput
from jaxtune.generate.results import Updates
from jaxtune.lora import LoraConfig
from jaxtune.models.names import Leaves, Slot, join, module_slots


@partial(jax.jit, static_argnames="graphdef")
def _logits(graphdef, trainable, base, batch):
    module = join(graphdef, trainable, base)
    x, how = module.place_images(module.embed(batch["input_ids"]), batch)
    hidden, _ = module.hidden(x, batch["positions"], batch["segment_ids"], **how)
    return module.logits(hidden)


class Model:
    """A language model: a graph definition, its trained leaves, its frozen leaves.

    Attributes:
      config: transformers' config. tokenizer, checkpoint (`hub.Checkpoint`), name_or_path: where it came from.
      processor: of text and images, around the tokenizer; None for a model of text.
      graphdef, trainable, base: the split model; flat dicts path -> array, that lie as `layout` says.
      lora: LoraConfig, or None. dtype: of activations and unquantised frozen weights. max_seq_length: tokens.
      compute_dtype: "fp8" where products with NF4 weights are taken in it, else None.
      slots: checkpoint module name -> Slot(path, index).
      gradient_checkpointing: what the trainer does unless told otherwise.
    """

    def __init__(
        self, module, trainable: Leaves, base: Leaves, *, checkpoint, tokenizer, max_seq_length: int, recipe,
        processor=None, layout: Layout = ONE_DEVICE,
    ):  # fmt: skip
        self.module, self.trainable, self.base, self.layout = module, trainable, base, layout
        self.checkpoint, self.tokenizer, self.processor = checkpoint, tokenizer, processor
        self.config, self.name_or_path = checkpoint.config, checkpoint.name_or_path
        self.max_seq_length, self.dtype = max_seq_length, module.dtype
        self.compute_dtype = "fp8" if module.fp8 else None
        self.lora: LoraConfig | None = None
        self.full_finetuning = False
        self.gradient_checkpointing = True
        self._recipe = recipe
        self._engine, self._keeps_engine = Engine(weakref.proxy(self)), False
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
        """Bytes of all leaves on one device."""
        return sum(map(device_bytes, (*self.base.values(), *self.trainable.values())))

    def logits(
        self, input_ids, attention_mask=None, positions=None, segment_ids=None, **processed
    ) -> jax.Array:
        """float32 [B, T, V] of int [B, T] ids; attention_mask marks the tokens (either side may be padded).

        processed: what the processor gave of images ("pixel_values", …), in the order of their places in the rows.
        """
        ids = jnp.asarray(_numpy(input_ids), jnp.int32)
        if segment_ids is None:
            segment_ids = (
                jnp.ones_like(ids)
                if attention_mask is None
                else jnp.asarray(_numpy(attention_mask), jnp.int32)
            )
        if positions is None:
            positions = jnp.maximum(jnp.cumsum(segment_ids, 1) - 1, 0)
        batch = {"input_ids": ids, "positions": positions, "segment_ids": segment_ids}
        family = images.family(self.config)
        known = set(images.TOKEN_KINDS) | set(() if family is None else family.processor_keys)
        if unknown := processed.keys() - known:
            raise TypeError(f"{self.config.model_type} does not know {', '.join(sorted(unknown))}")
        if family is not None:
            mask = np.asarray(segment_ids) != 0
            rows = self._image_rows(processed, [row[own] for row, own in zip(ids, mask, strict=True)])
            batch |= images.batch_arrays(family, np.asarray(ids), mask, rows)
        one = self.on_one_device()
        return _logits(self.graphdef, one.trainable, one.base, batch)

    def _image_rows(self, processed: Mapping[str, Any], texts: Sequence) -> list[images.Processed]:
        """The images of each text (int [T]), of what the processor gave for all."""
        family = images.family(self.config)
        assert family is not None
        given = {k: _numpy(processed[k]) for k in family.processor_keys if processed.get(k) is not None}
        return family.rows(given, [np.asarray(text) for text in texts])

    def on_one_device(self, number: int = 0) -> "Model":
        """A handle on copies of the leaves on one of this process's devices (themselves, where a layout has one
        device), for what does not run on several. Frozen weights that are split are gathered: they have to fit.
        """
        if self.layout.mesh is None:
            return self
        one = copy.copy(self)
        one.layout = ONE_DEVICE
        one.trainable, one.base = (
            self.layout.on_one_device(leaves, number) for leaves in (self.trainable, self.base)
        )
        return one

    def for_inference(self) -> "Model":
        """Keeps what `generate` makes of the weights, if it makes a copy of them, for the next call."""
        self._keeps_engine = True
        return self

    def for_training(self) -> "Model":
        """Frees what `for_inference` keeps."""
        self._keeps_engine = False
        self._engine.close()
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
        images: Any = None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        streamer=None,
        seed: int = 0,
        num_return_sequences: int = 1,
        stop_strings: str | Sequence[str] | None = None,
        use_cache: bool = True,
        **sampling,
    ) -> np.ndarray:
        """Continues prompts, as transformers' `generate`.

        Args:
          input_ids: int [B, P] (numpy, JAX, torch or lists), padded on the left; or a text or a chat, or a list of
            them; see `generate.prompts.read_prompts`.
          attention_mask: int [B, P]; without it everything but padding in front counts.
          images: of texts and chats, the images of each; of a single one also an image.
          max_new_tokens: most tokens to generate, 128 unless max_length (prompt included) says otherwise.
          eos_token_id: what ends a row; by default the generation config's and the tokenizer's.
          streamer: gets the prompt, then each token, then end(): a TextStreamer. One prompt only.
          seed: of the sampling.
          num_return_sequences: answers to each prompt, one after the other in the result.
          stop_strings: texts that end a row too.
          sampling: do_sample, temperature, top_k, top_p, min_p, repetition_penalty; defaults are the generation
            config's. Without do_sample the most likely token is taken. And what else the processor of a
            vision-language model gave: pixel_values and so on.

        Returns:
          int32 [B, P + n], prompts included, padded after the end. `generate.Engine` also gives log-probabilities.
        """
        del use_cache
        if isinstance(input_ids, Mapping):
            sampling = {
                k: v for k, v in input_ids.items() if k not in ("input_ids", "attention_mask")
            } | sampling
        processed = self._taken_out(sampling)
        pad = self._pad_id() if pad_token_id is None else pad_token_id
        rows = None
        if is_written(input_ids):
            written, rows = read_prompts(self, input_ids, images)
            input_ids, attention_mask = _left_padded(written, pad)
        elif images is not None:
            raise ValueError(
                "images go with texts and chats; with token ids give what the processor made of them"
            )
        ids, mask = self._prompts(input_ids, attention_mask, pad)
        if max_new_tokens is None:
            max_new_tokens = 128 if max_length is None else max_length - ids.shape[1]
        self._warn_of_length(ids.shape[1] + max_new_tokens)
        empty = np.flatnonzero(mask.sum(1) == 0)
        if empty.size:
            raise ValueError(f"prompt {int(empty[0])} is empty: its attention_mask has no 1")
        texts = [row[kept != 0] for row, kept in zip(ids, mask, strict=True)]
        if processed:
            rows = self._image_rows(processed, texts)
        if rows is None:
            refuse_placeholders(self, texts)
        if streamer is not None:
            if num_return_sequences > 1:
                raise ValueError(
                    f"a streamer takes one answer, got num_return_sequences={num_return_sequences}"
                )
            streamer.put(ids)
        try:
            found = self._engine.generate(
                [text.tolist() for text in texts],
                images=rows,
                n=num_return_sequences,
                sampling=self._sampling(sampling),
                max_new_tokens=max_new_tokens,
                seed=seed,
                stop_token_ids=self.stop_ids(eos_token_id),
                stop_strings=[stop_strings] if isinstance(stop_strings, str) else stop_strings or (),
                on_tokens=None if streamer is None else partial(_stream, streamer),
            )
        finally:
            if not self._keeps_engine:
                self._engine.close()
        if streamer is not None:
            streamer.end()
        return np.concatenate([ids.repeat(num_return_sequences, 0), _padded(found, pad)], 1)

    def _taken_out(self, given: dict[str, Any]) -> dict[str, Any]:
        """What the processor gave of images, removed from the other arguments."""
        family = images.family(self.config)
        names = () if family is None else (*images.TOKEN_KINDS, *family.processor_keys)
        found = {name: given.pop(name) for name in names if name in given}
        return {name: value for name, value in found.items() if name not in images.TOKEN_KINDS}

    def _warn_of_length(self, length: int) -> None:
        if length > self.max_seq_length:
            warnings.warn(
                f"prompt and max_new_tokens make {length} tokens, max_seq_length is {self.max_seq_length}",
                stacklevel=3,
            )

    def _pad_id(self) -> int:
        for holder in (self.tokenizer, self.config.get_text_config()):
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
        ids = np.atleast_2d(_numpy(input_ids)).astype(np.int32)
        if attention_mask is None:
            # padding in front only: a pad token inside or at the end of a prompt is a token
            attention_mask = np.maximum.accumulate(ids != pad, axis=1)
        return ids, np.atleast_2d(_numpy(attention_mask)).astype(np.int32)

    def _sampling(self, given: dict[str, Any]) -> Sampling:
        names = {"do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
        sort_out(
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

    def stop_ids(self, given: int | Sequence[int] | None = None) -> list[int]:
        """The ids that end an answer: `given`, or the generation config's and the tokenizer's."""
        text = self.config.get_text_config()
        sources = (
            [given]
            if given is not None
            else [
                self.checkpoint.generation_config.get("eos_token_id", text.eos_token_id),
                getattr(self.tokenizer, "eos_token_id", None),
            ]
        )
        ids: set[int] = set()
        for source in sources:
            if source is not None:
                ids.update([source] if isinstance(source, int) else source)
        return sorted(ids)

    def fast_generate(
        self,
        prompts: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        lora_request: LoRARequest | None = None,
    ) -> list[RequestOutput]:
        """Answers with vLLM's names, as Unsloth's notebooks ask for them; see generate.requests.fast_generate."""
        return fast_generate(self, prompts, sampling_params, lora_request)

    def save_lora(self, directory: str | Path) -> None:
        """Writes the adapter, as PEFT reads it."""
        save_adapter(self, directory)

    def load_lora(self, directory: str | Path) -> LoRARequest:
        """An adapter of this shape, for fast_generate."""
        return LoRARequest(Path(directory))

    def save_pretrained(self, directory: str | Path, **_) -> None:
        """Writes the adapter in PEFT's format, with the tokenizer; a fully fine-tuned model as 16-bit weights."""
        save = save_merged if self.full_finetuning else save_adapter
        save(self, directory)

    def save_pretrained_merged(
        self, directory: str | Path, tokenizer=None, save_method: str = "merged_16bit", **options
    ) -> None:
        """Writes adapter ("lora") or merged model ("merged_16bit", "merged_4bit"); see export.merged.save_merged."""
        save_merged(self, directory, tokenizer, save_method=save_method, **options)

    def push_to_hub(self, repo_id: str, **options) -> str:
        """Uploads the adapter; see export.upload.push_to_hub."""
        return upload.push_to_hub(self, repo_id, **options)

    def push_to_hub_merged(
        self, repo_id: str, tokenizer=None, save_method: str = "merged_16bit", **options
    ) -> str:
        """Uploads a merged model; see export.upload.push_to_hub_merged."""
        return upload.push_to_hub_merged(self, repo_id, tokenizer, save_method=save_method, **options)

    def save_pretrained_gguf(
        self,
        directory: str | Path,
        tokenizer=None,
        quantization_method: str | Sequence[str] = "fast_quantized",
        *,
        imatrix=None,
        imatrix_file=None,
        save_method: str | None = None,
        **options,
    ) -> dict[str, Any]:
        """Writes .gguf files for llama.cpp and Ollama; see export.save_gguf.save_gguf for arguments and result.

        imatrix_file is Unsloth's name of imatrix. save_method="lora" writes the adapter alone, for llama.cpp's --lora.
        """
        options = _gguf_options("save_pretrained_gguf", options)
        if save_method == "lora":
            return save_lora_gguf(self, directory, **options)
        if save_method is not None:
            raise ValueError(f"save_method is 'lora' or left out, got {save_method!r}")
        imatrix = imatrix if imatrix is not None else imatrix_file
        return save_gguf(
            self, directory, tokenizer or self.tokenizer, quantization_method, imatrix=imatrix, **options
        )

    def push_to_hub_gguf(
        self,
        repo_id: str,
        tokenizer=None,
        quantization_method: str | Sequence[str] = "fast_quantized",
        *,
        imatrix=None,
        imatrix_file=None,
        **options,
    ) -> str:
        """Uploads .gguf files with their Modelfile; see export.upload.push_to_hub_gguf."""
        imatrix = imatrix if imatrix is not None else imatrix_file
        options = _gguf_options("push_to_hub_gguf", options)
        return upload.push_to_hub_gguf(
            self, repo_id, tokenizer or self.tokenizer, quantization_method, imatrix=imatrix, **options
        )


def _stream(streamer, new: Updates) -> None:
    for token in new[0][1]:
        streamer.put(np.array([token]))


def _left_padded(rows: Sequence[list[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, int [B, P]."""
    width = max(map(len, rows))
    ids = np.array([[pad] * (width - len(row)) + row for row in rows])
    return ids, np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def _padded(answers: Generations, pad: int) -> np.ndarray:
    """int32 [N, n], n the longest answer's length."""
    ids = np.full((len(answers), max(len(answer.token_ids) for answer in answers)), pad, np.int32)
    for row, answer in zip(ids, answers, strict=True):
        row[: len(answer.token_ids)] = answer.token_ids
    return ids


# Arguments of Unsloth's GGUF export that have no meaning here: nothing is written twice and no llama.cpp is built.
_GGUF_IGNORED = ["first_conversion", "maximum_memory_usage", "max_shard_size", "safe_serialization", "tags"]


def _gguf_options(function: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options of save_gguf; Unsloth's others warn or raise."""
    foreign = {name: given.pop(name) for name in list(given) if name in {*_GGUF_IGNORED, "push_to_hub"}}
    sort_out(function, foreign, _GGUF_IGNORED, {"push_to_hub": False})
    return given


def _numpy(value) -> np.ndarray:
    """An array from numpy, JAX, lists, or a torch tensor on any device."""
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)
