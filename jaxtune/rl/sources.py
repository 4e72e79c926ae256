"""Which source of completions a configuration asks for."""

from typing import Any

from jaxtune import cluster
from jaxtune.model import Model
from jaxtune.rl.config import GRPOConfig
from jaxtune.rl.rollout import EngineRollout, FunctionRollout, Rollout, RolloutFunc
from jaxtune.rl.vllm_rollout import VLLMRollout


def make_rollout(model: Model, args: GRPOConfig, rollout_func: RolloutFunc | None, trainer: Any) -> Rollout:
    """A user's function, vLLM, or the embedded engine.

    Raises:
        ValueError: vLLM cannot serve this model, or is not there; or it does not go on several hosts.
    """
    if cluster.part()[1] > 1 and args.use_vllm and rollout_func is None:
        raise ValueError(
            "use_vllm=True is for the GPUs of one host, and this run has several processes; leave it out: the embedded "
            "engine runs on every GPU"
        )
    if cluster.part()[1] > 1 and model.layout.fsdp > 1 and rollout_func is None:
        raise ValueError(
            f"fsdp={model.layout.fsdp}: in a run of several processes the embedded engine needs the base whole on each "
            "GPU; load it with fsdp=1"
        )
    if rollout_func is not None:
        return FunctionRollout(rollout_func, trainer)
    return VLLMRollout(model, args) if args.use_vllm else EngineRollout(model, args)
