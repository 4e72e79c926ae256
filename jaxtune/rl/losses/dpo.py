"""The losses of direct preference optimisation and its relatives, with the names and numbers of TRL.

A batch is B pairs: of the first B rows a person prefers each to the row B places on. With Δ the difference, chosen
minus rejected, of log π/π_ref of the completions (or of a divergence's f' in its place, see `_scores`):
    sigmoid (DPO, arXiv 2305.18290)  -log σ(βΔ)
    hinge (arXiv 2305.10425)         max(0, 1 - βΔ)
    ipo (arXiv 2310.12036)           (Δ per token - 1/(2β))²
and so on: every loss is one small function in `LOSSES`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid

Metrics = dict[str, jax.Array]
LossType = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

# Losses of the difference of scores alone: in it the divergence's β·log Z(x), which is not known, cancels out.
OF_DIFFERENCES = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
NOT_OF_PAIRS = {"aot", "aot_unpaired", "sft"}  # their terms belong to no pair
LARGEST_EXPONENT = 80.0  # exp of it is still a float32


@dataclass(frozen=True)
class DPOLossOptions:
    """Static choices of the loss: TRL's names and defaults.

    loss_type: one or several, summed with loss_weights (None: 1 each). beta: how much leaving the reference costs (ipo:
    τ). label_smoothing: probability that a preference is the wrong way round (robust, exo_pair, aot). ld_alpha: weight
    of the tokens beyond the length of the shorter of a pair (LD-DPO, arXiv 2409.06411), None: 1. use_weighting: weigh
    pairs by how likely the policy makes them (WPO, arXiv 2406.11827). f_divergence_type: f-DPO, arXiv 2309.16240.
    """

    loss_type: tuple[LossType, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    ld_alpha: float | None = None
    f_divergence_type: Divergence = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    use_weighting: bool = False
    discopop_tau: float = 0.05

    def __post_init__(self) -> None:
        for given in self.loss_type:
            if given not in LOSSES:
                raise ValueError(
                    f"loss_type={given!r} is not supported; expected some of {', '.join(LOSSES)}"
                )
        if not self.loss_type or len(self.weights) != len(self.loss_type):
            raise ValueError(
                f"expected one of loss_weights for each loss_type, and at least one; got {self.loss_weights} for "
                f"{self.loss_type}"
            )
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, got {self.beta!r}")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha must be from 0 to 1, or None, got {self.ld_alpha!r}")
        self._check_smoothing()
        self._check_divergence()
        apart = sorted(set(self.loss_type) & NOT_OF_PAIRS)
        if self.use_weighting and apart:
            raise ValueError(f"use_weighting weighs pairs; the terms of {', '.join(apart)} belong to none")

    def _check_smoothing(self) -> None:
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                "label_smoothing is the probability of a wrong label, from 0 to below 0.5; got "
                f"{self.label_smoothing!r}"
            )
        if "exo_pair" in self.loss_type and not self.label_smoothing:
            raise ValueError("loss_type='exo_pair' needs label_smoothing above 0; its paper takes 1e-3")

    def _check_divergence(self) -> None:
        if self.f_divergence_type not in get_args(Divergence):
            choices = ", ".join(map(repr, get_args(Divergence)))
            raise ValueError(f"f_divergence_type={self.f_divergence_type!r}; expected one of {choices}")
        others = set(self.loss_type) - OF_DIFFERENCES
        if self.f_divergence_type != "reverse_kl" and others:
            raise ValueError(
                f"f_divergence_type={self.f_divergence_type!r} has no meaning for {', '.join(sorted(others))}; it "
                f"goes with {', '.join(sorted(OF_DIFFERENCES))}"
            )

    @property
    def weights(self) -> tuple[float, ...]:
        return (1.0,) * len(self.loss_type) if self.loss_weights is None else self.loss_weights


class Half(NamedTuple):
    """The chosen completions, or the rejected ones: float32, [B] but for token_log_probs and mask [B, T]."""

    log_probs: jax.Array  # of the completion
    ref_log_probs: jax.Array
    scores: jax.Array  # log-ratios, or what the divergence makes of them
    lengths: jax.Array  # tokens, at least 1
    token_log_probs: jax.Array
    mask: jax.Array

    @property
    def log_ratios(self) -> jax.Array:
        return self.log_probs - self.ref_log_probs


class Pairs(NamedTuple):
    chosen: Half
    rejected: Half
    real: jax.Array  # bool [B], False for pairs that only fill the batch

    @property
    def difference(self) -> jax.Array:
        return self.chosen.scores - self.rejected.scores

    @property
    def difference_per_token(self) -> jax.Array:
        return self.chosen.scores / self.chosen.lengths - self.rejected.scores / self.rejected.lengths


def sequence_log_probs(log_probs: jax.Array, mask: jax.Array, ld_alpha: float | None = None) -> jax.Array:
    """Log-probability of each completion, [2B]: the sum over its tokens [2B, T].

    ld_alpha: weight of the tokens that come after the last token of the pair's shorter completion.
    """
    log_probs = jnp.where(mask > 0, log_probs, 0)
    if ld_alpha is None:
        return jnp.sum(log_probs, 1)
    place = jnp.cumsum(mask > 0, 1)  # 1 at a completion's first token
    lengths = place[:, -1]
    shared = jnp.tile(jnp.minimum(*jnp.split(lengths, 2)), 2)[:, None]
    return jnp.sum(log_probs * jnp.where(place <= shared, 1.0, ld_alpha), 1)


def dpo_loss(
    log_probs: jax.Array,
    mask: jax.Array,
    ref_log_probs: jax.Array,
    options: DPOLossOptions,
    *,
    log_sum_sq_probs: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """The mean loss of B pairs, and what TRL logs of them.

    A pair without a token only fills the batch and has no part in anything.

    Args:
      log_probs: [2B, T], the policy's, of the tokens where mask is 1; elsewhere they may be anything.
      mask: [2B, T], 1 on the tokens of the completions. The B chosen rows come first.
      ref_log_probs: [2B], `sequence_log_probs` of the reference.
      log_sum_sq_probs: [2B, T], log Σ p² over the vocabulary at each token (use_weighting).

    Returns:
      (loss, metrics), float32 scalars: rewards/{chosen,rejected,accuracies,margins}, logps/{chosen,rejected}; NaN
      where no pair is real, and the loss is 0 then.

    Raises:
      ValueError: shapes do not fit, or log_sum_sq_probs is missing.
    """
    _check(log_probs, mask, ref_log_probs, options, log_sum_sq_probs)
    mask = mask.astype(jnp.float32)
    log_probs = jnp.where(mask > 0, log_probs, 0)
    pairs = _pairs(log_probs, mask, ref_log_probs, options)
    count = jnp.sum(pairs.real)
    mean = lambda x: jnp.sum(jnp.where(pairs.real, x, 0)) / jnp.maximum(count, 1)  # noqa: E731
    weight = _wpo_weights(log_probs, mask, log_sum_sq_probs) if options.use_weighting else 1.0
    loss = jnp.float32(0)
    for name, share in zip(options.loss_type, options.weights):
        loss += share * mean(LOSSES[name](pairs, options) * weight)
    rewards = [options.beta * half.log_ratios for half in (pairs.chosen, pairs.rejected)]
    metrics = {
        "rewards/chosen": mean(rewards[0]),
        "rewards/rejected": mean(rewards[1]),
        "rewards/accuracies": mean(rewards[0] > rewards[1]),
        "rewards/margins": mean(rewards[0] - rewards[1]),
        "logps/chosen": mean(pairs.chosen.log_probs),
        "logps/rejected": mean(pairs.rejected.log_probs),
    }
    return loss, {name: jnp.where(count > 0, value, jnp.nan) for name, value in metrics.items()}


def _pairs(log_probs: jax.Array, mask: jax.Array, ref_log_probs: jax.Array, options: DPOLossOptions) -> Pairs:
    totals = sequence_log_probs(log_probs, mask, options.ld_alpha)
    counts = jnp.sum(mask, 1)
    ref_log_probs = jnp.where(counts > 0, jax.lax.stop_gradient(ref_log_probs), 0)
    scores = _scores(totals - ref_log_probs, options)
    arrays = (totals, ref_log_probs, scores, jnp.maximum(counts, 1), log_probs, mask)
    chosen, rejected = (Half(*half) for half in zip(*(jnp.split(x, 2) for x in arrays)))
    return Pairs(chosen, rejected, jnp.any(jnp.stack(jnp.split(counts, 2)) > 0, 0))


def _scores(log_ratios: jax.Array, options: DPOLossOptions) -> jax.Array:
    """f'(π/π_ref) of the divergence, up to a constant."""
    kind, alpha = options.f_divergence_type, options.f_alpha_divergence_coef
    if kind == "forward_kl":
        return 1 - jnp.exp(-log_ratios)
    if kind == "js_divergence":
        return math.log(2) + log_sigmoid(log_ratios)
    if kind == "alpha_divergence" and abs(alpha - 1) >= 1e-6:  # at 1 it is reverse_kl
        return jnp.expm1(_at_most((alpha - 1) * log_ratios, LARGEST_EXPONENT)) / (alpha - 1)
    return log_ratios


def _at_most(x: jax.Array, bound: float) -> jax.Array:
    """The gradient is 1 up to and at the bound, as torch's clamp; jnp.minimum halves it there."""
    return jnp.where(x > bound, bound, x)


def _wpo_weights(log_probs: jax.Array, mask: jax.Array, log_sum_sq_probs: jax.Array | None) -> jax.Array:
    """[B]: of both completions the geometric mean of p/Σp², multiplied. No gradient."""
    aligned = jnp.where(mask > 0, log_probs - log_sum_sq_probs, 0)
    weights = jnp.exp(jnp.sum(aligned, 1) / jnp.maximum(jnp.sum(mask, 1), 1))
    chosen, rejected = jnp.split(jax.lax.stop_gradient(weights), 2)
    return chosen * rejected


def _smoothed(x: jax.Array, options: DPOLossOptions) -> jax.Array:
    smoothing = options.label_smoothing
    return -log_sigmoid(x) * (1 - smoothing) - log_sigmoid(-x) * smoothing


def _exo_pair(pairs: Pairs, options: DPOLossOptions) -> jax.Array:
    """KL(softmax of the two rewards ‖ (1 - ε, ε)); arXiv 2402.00856, eq. 16."""
    x, epsilon = options.beta * pairs.difference, options.label_smoothing
    chosen = sigmoid(x) * (log_sigmoid(x) - math.log1p(-epsilon))
    return chosen + sigmoid(-x) * (log_sigmoid(-x) - math.log(epsilon))


def _nca_pair(pairs: Pairs, options: DPOLossOptions) -> jax.Array:
    """arXiv 2402.05369."""
    chosen, rejected = options.beta * pairs.chosen.log_ratios, options.beta * pairs.rejected.log_ratios
    return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


def _robust(pairs: Pairs, options: DPOLossOptions) -> jax.Array:
    """What is unbiased when labels are wrong with probability ε; arXiv 2403.00409."""
    x, epsilon = options.beta * pairs.difference, options.label_smoothing
    return (-(1 - epsilon) * log_sigmoid(x) + epsilon * log_sigmoid(-x)) / (1 - 2 * epsilon)


def _bco_pair(pairs: Pairs, options: DPOLossOptions) -> jax.Array:
    """arXiv 2404.04656."""
    chosen, rejected = options.beta * pairs.chosen.log_ratios, options.beta * pairs.rejected.log_ratios
    return -log_sigmoid(chosen) - log_sigmoid(-rejected)


def _sppo_hard(pairs: Pairs, options: DPOLossOptions) -> jax.Array:
    """arXiv 2405.00675, the winner always preferred."""
    goal = 0.5 / options.beta
    return (pairs.chosen.log_ratios - goal) ** 2 + (pairs.rejected.log_ratios + goal) ** 2


def _sorted(x: jax.Array, pairs: Pairs) -> jax.Array:
    """Ascending, the pairs that only fill the batch at the end."""
    return jnp.sort(jnp.where(pairs.real, x, jnp.inf))


def _sorted_difference(left: jax.Array, right: jax.Array, pairs: Pairs, options: DPOLossOptions) -> jax.Array:
    """Losses of the i-th smallest against the i-th smallest (AOT, arXiv 2406.05882), in any order over real pairs."""
    count = jnp.sum(pairs.real)
    real = jnp.arange(len(left)) < count
    left, right = (jnp.where(real, _sorted(x, pairs), 0) for x in (left, right))
    losses = jnp.where(real, _smoothed(options.beta * (left - right), options), 0)
    return jnp.full_like(left, jnp.sum(losses) / jnp.maximum(count, 1))


def _aot(pairs: Pairs, options: DPOLossOptions) -> jax.Array:
    policy = pairs.chosen.log_probs - pairs.rejected.log_probs
    reference = pairs.chosen.ref_log_probs - pairs.rejected.ref_log_probs
    return _sorted_difference(policy, reference, pairs, options)


def _aot_unpaired(pairs: Pairs, options: DPOLossOptions) -> jax.Array:
    return _sorted_difference(pairs.chosen.log_ratios, pairs.rejected.log_ratios, pairs, options)


def _apo_zero(pairs: Pairs, options: DPOLossOptions) -> jax.Array:
    """Chosen up, rejected down; arXiv 2408.06266, eq. 7."""
    beta = options.beta
    return 1 - sigmoid(beta * pairs.chosen.log_ratios) + sigmoid(beta * pairs.rejected.log_ratios)


def _apo_down(pairs: Pairs, options: DPOLossOptions) -> jax.Array:
    """Both down, the rejected more; arXiv 2408.06266, eq. 8."""
    chosen, rejected = pairs.chosen.log_ratios, pairs.rejected.log_ratios
    return sigmoid(options.beta * chosen) + 1 - sigmoid(options.beta * (chosen - rejected))


def _discopop(pairs: Pairs, options: DPOLossOptions) -> jax.Array:
    """A blend of logistic and exponential loss; arXiv 2406.08414, eq. 5."""
    x, tau = options.beta * pairs.difference, options.discopop_tau
    exponential = jnp.exp(
        log_sigmoid(x / tau) - x
    )  # of a sum: the factors' overflow where their product is small
    return -log_sigmoid(x) * sigmoid(-x / tau) + exponential


def _sft(pairs: Pairs, options: DPOLossOptions) -> jax.Array:
    """-log p of a token of the chosen completions: the mean over all tokens of the batch, the same for every pair."""
    chosen = pairs.chosen
    mean = jnp.sum(chosen.token_log_probs * chosen.mask) / jnp.maximum(jnp.sum(chosen.mask), 1)
    return jnp.full_like(chosen.scores, -mean)


LOSSES: dict[str, Callable[[Pairs, DPOLossOptions], jax.Array]] = {
    "sigmoid": lambda pairs, options: -log_sigmoid(options.beta * pairs.difference),
    "hinge": lambda pairs, options: jax.nn.relu(1 - options.beta * pairs.difference),
    "ipo": lambda pairs, options: (pairs.difference_per_token - 1 / (2 * options.beta)) ** 2,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sft": _sft,
    "sigmoid_norm": lambda pairs, options: -log_sigmoid(options.beta * pairs.difference_per_token),
}


def _check(log_probs, mask, ref_log_probs, options, log_sum_sq_probs) -> None:
    rows = log_probs.shape[0]
    if log_probs.ndim != 2 or mask.shape != log_probs.shape or rows % 2 or ref_log_probs.shape != (rows,):
        raise ValueError(
            "expected log_probs and mask [2B, T] and ref_log_probs [2B]; got "
            f"{log_probs.shape}, {mask.shape} and {ref_log_probs.shape}"
        )
    if options.use_weighting and log_sum_sq_probs is None:
        raise ValueError("use_weighting needs log_sum_sq_probs")
