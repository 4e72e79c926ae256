"""Answers from vLLM: before the first question, whether the server's model is the one to evaluate."""

import copy
from pathlib import Path

import jax
import numpy as np

from jaxtune.evaluate.run import Plan
from jaxtune.generate import Generations, Sampling
from jaxtune.model import Model
from jaxtune.rl.reference import without_adapter
from jaxtune.rl.vllm_config import VLLMConfig
from jaxtune.rl.vllm_engine import VLLMEngine
from jaxtune.rl.vllm_rollout import check_adapter, check_gap

ROWS = 1024  # answers between two saves
COMPARED = 4  # prompts whose first answer is computed here too
COMPARED_TOKENS = 32  # of each such answer at most


def vllm_engine(model: Model, planned: Plan, args: VLLMConfig, folder: Path) -> VLLMEngine:
    """The engine for an evaluation; it starts a server (log in `folder`) or looks for one when it is first asked.

    Raises:
        ValueError: vLLM cannot express this model, or is not installed where it is looked for.
    """
    longest = max(map(len, planned.prompts))
    return VLLMEngine(model, args, folder, length=longest + planned.config.max_new_tokens)


def check_server(engine: VLLMEngine, planned: Plan, args: VLLMConfig) -> float:
    """Compares log-probabilities of a few answers with those that jaxtune computes.

    They are sampled at temperature 1 from all tokens, where all of a server's ways to report them are the same.

    Returns:
        the mean |Δ log p|, in nats per token.

    Raises:
        VLLMError: no server, or one of another model, or one that takes adapters without using them.
    """
    model = engine.model
    prompts = sorted(planned.prompts, key=len)[:COMPARED]
    most = min(COMPARED_TOKENS, planned.config.max_new_tokens)
    made = engine.generate(
        prompts, sampling=Sampling(do_sample=True), max_new_tokens=most, seed=planned.config.seed
    )
    gap = _gap(model, prompts, made)
    if model.lora is not None and gap > args.vllm_logprob_warning / 2:
        base = copy.copy(model)
        base.base = without_adapter(model.base)
        check_adapter(gap, _gap(base, prompts, made))
    check_gap(gap, args)
    return gap


def _gap(model: Model, prompts: list[list[int]], made: Generations) -> float:
    """Mean |Δ| between log-probabilities of answers and those of a model, in nats per token."""
    width = max(len(prompt) + len(one.token_ids) for prompt, one in zip(prompts, made, strict=True))
    gaps = []
    for prompt, one in zip(prompts, made, strict=True):
        row = [*prompt, *one.token_ids]
        ids, mask = np.zeros((1, width), np.int32), np.zeros((1, width), np.int32)
        ids[0, : len(row)], mask[0, : len(row)] = row, 1
        predicting = slice(len(prompt) - 1, len(row) - 1)
        logits = model.logits(ids, mask)[0, predicting]  # [C, V]
        own = np.asarray(jax.nn.log_softmax(logits.astype("float32")))
        gaps.append(np.abs(own[np.arange(len(one.token_ids)), one.token_ids] - one.logprobs))
    return float(np.concatenate(gaps).mean())
