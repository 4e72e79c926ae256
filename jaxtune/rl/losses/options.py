"""GRPOLossOptions: the static choices of GRPO's losses. Imports no jax, so that a command line is quick."""

from dataclasses import dataclass
from typing import Literal, get_args

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"]
Level = Literal["token", "sequence"]
Correction = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@dataclass(frozen=True)
class GRPOLossOptions:
    """Static choices of the loss: TRL's names and defaults.

    epsilon_high None: as epsilon. delta: upper bound of ρ also where A < 0 (two-sided clipping). beta: weight of the
    KL divergence to the reference. top_entropy_quantile: share of the tokens, those of highest entropy, whose policy
    term counts (arXiv 2506.01939). off_policy_mask_threshold: sequences with A < 0 and a mean log p(sampler)/p above
    it count nothing (arXiv 2512.02556). max_completion_length: in tokens, dr_grpo's divisor. vllm_importance_sampling:
    correction of what the engine that sampled computes otherwise, whichever engine that is.
    """

    loss_type: LossType = "dapo"
    importance_sampling_level: Level = "token"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    use_bias_correction_kl: bool = True
    sapo_temperature_neg: float = 1.05
    sapo_temperature_pos: float = 1.0
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    off_policy_mask_threshold: float | None = None
    top_entropy_quantile: float = 1.0
    max_completion_length: int = 512
    vllm_importance_sampling_correction: bool = True
    vllm_importance_sampling_mode: Correction = "sequence_mask"
    vllm_importance_sampling_clip_max: float | None = 3.0
    vllm_importance_sampling_clip_min: float | None = None

    def __post_init__(self) -> None:
        for name, kind in (
            ("loss_type", LossType),
            ("importance_sampling_level", Level),
            ("vllm_importance_sampling_mode", Correction),
        ):
            if getattr(self, name) not in get_args(kind):
                choices = ", ".join(map(repr, get_args(kind)))
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not supported; expected one of {choices}"
                )
        for name in ("sapo_temperature_neg", "sapo_temperature_pos", "max_completion_length"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")
        if not 0 <= self.top_entropy_quantile <= 1:
            raise ValueError(
                f"top_entropy_quantile is a share from 0 to 1, got {self.top_entropy_quantile!r}"
            )
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"vllm_importance_sampling_clip_min={low} must be below vllm_importance_sampling_clip_max={high}"
            )
        truncates = self.vllm_importance_sampling_mode.endswith("truncate")
        if self.vllm_importance_sampling_correction and truncates and low is None and high is None:
            raise ValueError(
                f"vllm_importance_sampling_mode={self.vllm_importance_sampling_mode!r} needs "
                "vllm_importance_sampling_clip_max or vllm_importance_sampling_clip_min"
            )

    @property
    def high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high
