"""Which source of completions a configuration asks for."""

from typing import Any

from jaxtune.model import Model
from jaxtune.rl.config import GRPOConfig
from jaxtune.rl.rollout import EngineRollout, FunctionRollout, Rollout, RolloutFunc
from jaxtune.rl.vllm_rollout import VLLMRollout


def make_rollout(model: Model, args: GRPOConfig, rollout_func: RolloutFunc | None, trainer: Any) -> Rollout:
    """A user's function, vLLM, or the embedded engine.

    Raises:
        ValueError: vLLM cannot serve this model, or is not there.
    """
    if rollout_func is not None:
        return FunctionRollout(rollout_func, trainer)
    return VLLMRollout(model, args) if args.use_vllm else EngineRollout(model, args)
