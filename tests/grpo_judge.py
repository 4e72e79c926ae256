"""TRL's own code for GRPO's losses, importance ratios and advantages, run on the cases of grpo_cases."""

import inspect
import math
import textwrap
import types
from collections import defaultdict
from functools import cache, partial

import grpo_cases
import numpy as np
import torch
import trl
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import nanmax, nanmin, nanstd

TRL = "1.16.0"  # the version whose source is sliced


def _accelerator():
    return types.SimpleNamespace(
        num_processes=1,
        sync_gradients=True,
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
        pad_across_processes=lambda x, dim, pad_index: x,
    )


@cache
def _slice(start: str, end: str):
    """Compiled lines of _generate_and_score_completions from the one that starts so to the one that starts so."""
    assert trl.__version__ == TRL, f"the slices are of TRL {TRL}, this is {trl.__version__}"
    lines = inspect.getsource(GRPOTrainer._generate_and_score_completions).splitlines()
    first = next(i for i, line in enumerate(lines) if line.strip().startswith(start))
    last = next(i for i, line in enumerate(lines) if i > first and line.strip().startswith(end))
    return compile(textwrap.dedent("\n".join(lines[first:last])), "trl", "exec")


def _torch(array, grad: bool = False):
    return torch.tensor(array, requires_grad=grad)


def importance_ratio(options: dict, old, sampling, mask):
    """TRL's importance ratio [B, T] or [B, 1], and its sampling/* metrics."""
    me = types.SimpleNamespace(
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=options.get("vllm_importance_sampling_mode", "sequence_mask"),
        vllm_importance_sampling_clip_max=options.get("vllm_importance_sampling_clip_max", 3.0),
        vllm_importance_sampling_clip_min=options.get("vllm_importance_sampling_clip_min"),
        accelerator=_accelerator(),
        _metrics={"train": defaultdict(list)},
    )
    scope = {"self": me, "torch": torch, "math": math, "nanmin": nanmin, "nanmax": nanmax, "mode": "train"}
    scope |= {"completion_mask": mask, "tool_mask": None, "device": "cpu"}
    scope |= {"old_per_token_logps": old, "sampling_per_token_logps": sampling}
    correction = "if self.use_vllm and self.vllm_importance_sampling_correction:"
    exec(_slice(correction, "# Compute the per-token log probabilities for the reference"), scope)
    lines = "delta = torch.abs(old_per_token_logps"
    exec(_slice(lines, "output = {"), scope)
    metrics = {name: values[0] for name, values in me._metrics["train"].items()}
    return scope["vllm_importance_sampling_ratio"], metrics


def _trainer(case: dict, log_probs, entropies):
    get = case.get
    args = types.SimpleNamespace(
        use_bias_correction_kl=get("use_bias_correction_kl", True),
        delta=get("delta"),
        sapo_temperature_pos=get("sapo_temperature_pos", 1.0),
        sapo_temperature_neg=get("sapo_temperature_neg", 1.05),
        vespo_k_pos=get("vespo_k_pos", 2.0),
        vespo_lambda_pos=get("vespo_lambda_pos", 3.0),
        vespo_k_neg=get("vespo_k_neg", 3.0),
        vespo_lambda_neg=get("vespo_lambda_neg", 2.0),
        steps_per_generation=get("STEPS", 1),
    )
    epsilon = get("epsilon", 0.2)
    me = types.SimpleNamespace(
        args=args,
        accelerator=_accelerator(),
        model=types.SimpleNamespace(training=get("TRAIN", True)),
        loss_type=case["loss_type"],
        importance_sampling_level=case["importance_sampling_level"],
        epsilon_low=epsilon,
        epsilon_high=epsilon if get("epsilon_high") is None else case["epsilon_high"],
        beta=get("beta", 0.0),
        off_policy_mask_threshold=get("off_policy_mask_threshold"),
        top_entropy_quantile=get("top_entropy_quantile", 1.0),
        max_completion_length=get("max_completion_length", 512),
        use_vllm=get("SAMPLING", False),
        vllm_importance_sampling_correction=get("CORRECTION", True),
        current_gradient_accumulation_steps=get("ACCUMULATION", 1),
        aux_loss_enabled=False,
        use_adaptive_entropy=False,
        entropy_coef=get("ENTROPY_COEF", 0.0),
        _entropy_bonus_enabled="ENTROPY_COEF" in case,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
    )
    me.get_high_entropy_mask = partial(GRPOTrainer.get_high_entropy_mask, me)
    me._get_per_token_logps_and_entropies = lambda *args, **kwargs: (log_probs, entropies, None)
    return me


def loss(case: dict, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """TRL's loss, gradients and metrics of a case: name -> float32 array."""
    live = arrays["mask"] > 0
    # Where the mask is 0, TRL's head gives exactly 0.
    clean = lambda name: _torch(np.where(live, arrays[name], 0).astype(np.float32))  # noqa: E731
    log_probs, entropies = clean("log_probs").requires_grad_(), clean("entropies").requires_grad_()
    mask = _torch(arrays["mask"]).int()
    ids = torch.zeros(mask.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1] + 1,
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": _torch(arrays["token_advantages" if case.get("TOKEN_ADVANTAGES") else "advantages"]),
        "num_items_in_batch": torch.tensor(31.0),
        "ref_per_token_logps": clean("ref"),
    }
    if case.get("OLD", True):
        inputs["old_per_token_logps"] = clean("extreme_old" if case.get("EXTREME") else "old")
    if case.get("SAMPLING"):
        inputs["sampling_per_token_logps"] = clean("sampling")
        if case.get("CORRECTION", True):
            old, sampling = inputs["old_per_token_logps"], inputs["sampling_per_token_logps"]
            inputs["importance_sampling_ratio"], _ = importance_ratio(case, old, sampling, mask)
    me = _trainer(case, log_probs, entropies)
    value = GRPOTrainer._compute_loss(me, None, inputs)
    value.backward()
    metrics = {name: values[0] for found in me._metrics.values() for name, values in found.items()}
    metrics.pop("entropy_coef", None)  # the trainer's own
    found = {"loss": value, "d_log_probs": log_probs.grad, **metrics}
    if entropies.grad is not None:
        found["d_entropies"] = entropies.grad
    return {name: np.asarray(torch.as_tensor(x).detach(), np.float32) for name, x in found.items()}


def advantages(rewards, weights, group: int, scale_rewards: str, aggregation: str) -> dict[str, np.ndarray]:
    """TRL's advantages and what it logs of the rewards."""
    names = [f"f{i}" for i in range(rewards.shape[1])]
    me = types.SimpleNamespace(
        multi_objective_aggregation=aggregation,
        scale_rewards=scale_rewards,
        reward_weights=_torch(weights),
        reward_funcs=names,
        reward_func_names=names,
        accelerator=types.SimpleNamespace(process_index=0),
        _metrics={"train": defaultdict(list)},
    )
    scope = {"self": me, "torch": torch, "nanstd": nanstd, "device": "cpu", "mode": "train"}
    scope |= {"rewards_per_func": _torch(rewards), "num_generations": group, "prompts": [""] * len(rewards)}
    exec(_slice("unscorable_mask =", "# Log prompts and completions"), scope)
    logged = {name: values[0] for name, values in me._metrics["train"].items()}
    found = {
        "values": scope["advantages"],
        "rewards": scope["rewards"],
        "std": scope["std_rewards"],
        "function_mean": [logged.pop(f"rewards/{name}/mean") for name in names],
        "function_std": [logged.pop(f"rewards/{name}/std") for name in names],
        **logged,
    }
    return {name: np.asarray(x, np.float32) for name, x in found.items()}


def results() -> dict[str, np.ndarray]:
    """All cases: "input <array>", "loss <case> <result>", "advantages <case> <result>" -> float32 array."""
    arrays = grpo_cases.arrays()
    found = {f"input {name}": array for name, array in arrays.items()}
    for name, case in grpo_cases.cases().items():
        found |= {f"loss {name} {key}": x for key, x in loss(case, arrays).items()}
    for name, case in grpo_cases.reward_cases().items():
        found |= {f"advantages {name} {key}": x for key, x in advantages(**case).items()}
    return found
