"""`model.fast_generate` with vLLM's names, as Unsloth's notebooks call it; the engine behind it is jaxtune's."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxtune.generate.engine import Engine
from jaxtune.generate.prompts import beside, read_prompts, refuse_placeholders
from jaxtune.generate.results import Generation
from jaxtune.generate.sampling import Sampling
from jaxtune.lora import adapter_leaves, read_adapter


@dataclass(frozen=True)
class SamplingParams:
    """vLLM's names and defaults.

    n: answers to each prompt. temperature: 0 takes the most likely token. top_k: -1 or 0 keeps all. max_tokens: of an
    answer. stop: texts that end it. include_stop_str_in_output: it is always kept.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 16
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    include_stop_str_in_output: bool = True

    def sampling(self) -> Sampling:
        if self.temperature == 0:
            return Sampling(repetition_penalty=self.repetition_penalty)
        return Sampling(
            do_sample=True,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )


@dataclass(frozen=True)
class CompletionOutput:
    """One answer. cumulative_logprob: of its tokens, in nats."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float
    finish_reason: str


@dataclass(frozen=True)
class RequestOutput:
    """A prompt with its answers."""

    prompt: str
    outputs: list[CompletionOutput]


@dataclass(frozen=True)
class LoRARequest:
    """The adapter that answers: a PEFT folder."""

    path: Path


def fast_generate(
    model: Any,
    prompts: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
    sampling_params: SamplingParams | None = None,
    lora_request: LoRARequest | None = None,
) -> list[RequestOutput]:
    """Answers to texts (chats as the chat template renders them).

    Args:
        model: a `jaxtune.model.Model`.
        prompts: texts; with images {"prompt": text, "multi_modal_data": {"image": an image or a list}}.
        sampling_params: how; vLLM's defaults.
        lora_request: from model.load_lora. None: the model without its adapter, as in vLLM.
    """
    given = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
    texts, pictures = beside(given)
    ids, rows = read_prompts(model, texts, pictures)
    if rows is None:
        refuse_placeholders(model, ids)
    params = sampling_params or SamplingParams()
    stop = [params.stop] if isinstance(params.stop, str) else list(params.stop or ())
    with Engine(_with_adapter(model, lora_request)) as engine:
        made = engine.generate(
            ids,
            images=rows,
            n=params.n,
            sampling=params.sampling(),
            max_new_tokens=params.max_tokens,
            seed=params.seed or 0,
            stop_strings=stop,
        )
    answers = [_output(model.tokenizer, one) for one in made]
    return [RequestOutput(text, answers[i * params.n : (i + 1) * params.n]) for i, text in enumerate(texts)]


def _output(tokenizer: Any, made: Generation) -> CompletionOutput:
    text = tokenizer.decode(made.token_ids, skip_special_tokens=True)
    total = float(sum(made.logprobs))
    return CompletionOutput(made.sample, text, list(made.token_ids), total, made.finish_reason)


def _with_adapter(model: Any, request: LoRARequest | None) -> Any:
    """The model with another adapter, or with none; it shares its weights."""
    if model.lora is None and request is None:
        return model
    other = copy.copy(model)
    if request is not None:
        leaves = adapter_leaves(model, read_adapter(request.path, model.checkpoint.text_side)[1])
        other.trainable = {path: jnp.asarray(value) for path, value in leaves.items()}
    else:
        base = model.base.items()
        other.base = {p: jnp.zeros_like(x) if p.endswith("lora_scaling") else x for p, x in base}
    return other
