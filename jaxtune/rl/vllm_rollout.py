"""Completions from vLLM for training, and what its log-probabilities say of the server."""

import math
import warnings

from jaxtune.model import Model
from jaxtune.rl.config import GRPOConfig
from jaxtune.rl.rollout import Completions, Request, chosen_sampling
from jaxtune.rl.vllm_config import VLLMConfig
from jaxtune.rl.vllm_engine import EMBEDDED, VLLMEngine
from jaxtune.rl.vllm_server import VLLMError


class VLLMRollout:
    """vLLM: a server that runs already (vllm_mode="server"), or one of this run (vllm_mode="colocate").

    Raises:
        ValueError: vLLM cannot express this model, or is not installed where it is looked for.
    """

    makes_prompt_ids = False

    def __init__(self, model: Model, args: GRPOConfig):
        if model.lora is None:
            raise ValueError(
                "use_vllm=True needs an adapter (get_peft_model): a server gets new versions as adapters; "
                + EMBEDDED
            )
        self._args, self._chosen = args, chosen_sampling(args)
        # At temperature 1 what the model says, before anything is cut.
        whole = self._chosen.sampling.temperature == 1
        mode = "raw_logprobs" if whole else "processed_logprobs"
        self.engine = VLLMEngine(model, args, args.output_dir, logprobs_mode=mode)
        self._logprobs_known = self._logprobs_are_whole(whole)

    def sync(self, step: int) -> None:
        """Gives the server the adapter as it is now.

        Raises:
            VLLMError: there is no server, or it refuses. ValueError: the adapter holds NaN.
        """
        self.engine.sync()

    def generate(self, request: Request) -> Completions:
        """Completions of the last synced adapter.

        Raises:
            VLLMError: no server, no answer in time, a refusal, or an answer that is none.
        """
        assert request.prompt_ids is not None
        made = self.engine.generate(
            request.prompt_ids[:: request.group],
            n=request.group,
            sampling=self._chosen.sampling,
            max_new_tokens=min(request.max_new_tokens, self._chosen.max_new_tokens),
            seed=request.seed + self._chosen.seed,
            stop_strings=self._chosen.stop_strings,
            seen=None if request.seen is None else request.seen[:: request.group],
        )
        known = self._logprobs_known
        return Completions(
            prompt_ids=request.prompt_ids,
            completion_ids=[one.token_ids for one in made],
            logprobs=[[float(x) if known else math.nan for x in one.logprobs] for one in made],
        )

    def _logprobs_are_whole(self, whole: bool) -> bool:
        """Whether the server's log-probabilities are of all tokens at the temperature, as the trainer's are.

        vLLM reports them either before temperature and cutting, or after both, renormalised over what was kept.
        """
        starts = self._args.vllm_mode == "colocate"
        if not self._chosen.sampling.cuts() or (starts and whole):
            return True
        where = "" if starts else " on a server of your own"
        warnings.warn(
            "with top_k, top_p, min_p or repetition_penalty vLLM's log-probabilities are of the tokens that are kept"
            f"{where}, and cannot be compared with the trainer's: they are neither measured nor corrected for"
            + (" (temperature=1 would allow it)" if starts else ' (vllm_mode="colocate" would allow it)'),
            stacklevel=4,
        )
        return False

    def pause(self) -> None:
        """Nothing: the server keeps its memory."""

    def forecast(self, groups: int, group: int, prompt: int) -> str:
        if self._args.vllm_mode == "server":
            return f"{groups} x {group} completions from vLLM at {self.engine.address}"
        share = self._args.vllm_gpu_memory_utilization
        return f"{groups} x {group} completions from vLLM, which takes {share:.0%} of the device's memory"

    def close(self) -> None:
        """Ends a server of this run, makes another one forget the adapter, and removes the folders."""
        self.engine.close()


def check_adapter(policy: float, reference: float) -> None:
    """Judges the mean |Δ log p| between vLLM and the model, with the adapter as it is now and as it began.

    Raises:
        VLLMError: vLLM is nearer to the latter by far: it takes adapters without using them.
    """
    if reference < policy / 2:
        raise VLLMError(
            f"vLLM samples without the adapter as trained: its log-probabilities are {reference:.3g} (nats per token, "
            f"on average) from those of the model that training began with, and {policy:.3g} from those of the model "
            "as it is now, although it has loaded each version. Try --enforce-eager among its arguments "
            f"(vllm_server_args), which leaves CUDA graphs out, another version of vLLM, or {EMBEDDED}"
        )


def check_gap(gap: float, args: VLLMConfig, *, advice: str = "", warn: bool = True) -> bool:
    """Judges the mean |Δ log p| (nats per token) between vLLM and the model as jaxtune computes it.

    Args:
        advice: the end of the warning. warn: whether to give one.

    Returns:
        whether it is above the bound for warnings.

    Raises:
        VLLMError: it is above the limit.
    """
    where = f"log-probabilities of vLLM and jaxtune differ by {gap:.3g} on average (nats per token)"
    if args.vllm_logprob_limit is not None and gap > args.vllm_logprob_limit:
        raise VLLMError(
            f"{where}, more than vllm_logprob_limit={args.vllm_logprob_limit}: the server has another base model, or "
            "reports log-probabilities before the temperature. A server for this run serves the base that "
            "jaxtune.rl.vllm_engine.save_policy_base writes (or the checkpoint, where the model is not in 4 bits), "
            "with --logprobs-mode processed_logprobs"
        )
    if gap > args.vllm_logprob_warning and warn:
        base = "" if args.vllm_base == "policy" else "; vllm_base='policy' serves the weights as trained"
        warnings.warn(
            f"{where}, more than vllm_logprob_warning={args.vllm_logprob_warning}{base}{advice}", stacklevel=2
        )
    return gap > args.vllm_logprob_warning
