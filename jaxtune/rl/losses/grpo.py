"""The losses of GRPO and its relatives, of per-token log-probabilities [B, T], with the names and numbers of TRL.

With ρ the ratio of new to old probability (of a token, or of the sequence's mean: GSPO, arXiv 2507.18071) and A the
advantage, a token's term is
    grpo, bnpo, dr_grpo, dapo, luspo: -min(min(ρ, delta)·A, clip(ρ, 1 - epsilon, 1 + epsilon_high)·A)
    cispo (arXiv 2506.13585): -sg(min(ρ, epsilon_high))·A·log p; epsilon_high is the bound itself here
    sapo (arXiv 2511.20347): -A·σ(τ(ρ - 1))·4/τ, τ by the sign of A
    vespo (arXiv 2602.10693): -sg(φ(w))·A·log p, φ(w) = w^k·exp(λ(1 - w)), w the whole sequence's ratio
What the terms are divided by is all that separates the first group: see `_aggregate`.
"""

import math

import jax
import jax.numpy as jnp

from jaxtune.rl.losses.options import GRPOLossOptions

Metrics = dict[str, jax.Array]
Number = float | jax.Array

PER_ITEM = ("dapo", "cispo", "vespo")  # divided by the label tokens of the whole optimizer step
LEAST_LOG_WEIGHT = math.log(1e-8)  # bounds of vespo's log w
MOST_LOG_WEIGHT = 20.0


def grpo_loss(
    log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    options: GRPOLossOptions,
    *,
    num_items: Number | None = None,
    accumulation: Number = 1,
    steps_per_generation: Number = 1,
    old_log_probs: jax.Array | None = None,
    ref_log_probs: jax.Array | None = None,
    sampling_log_probs: jax.Array | None = None,
    entropies: jax.Array | None = None,
    entropy_coef: Number | None = None,
    train: bool = True,
) -> tuple[jax.Array, Metrics]:
    """The loss of one micro-batch, and what TRL logs of it. Everything but options and train may be traced.

    Summed over an optimizer step's micro-batches, the gradients are those of the step. Where the mask is 0 the other
    arrays may hold anything. A row without tokens counts as a row: grpo, sapo and luspo average over all B.

    Args:
      log_probs: [B, T], the completion's tokens under the policy. advantages: [B] or [B, T].
      mask: [B, T], 1 on tokens that the model wrote and that count.
      num_items: the mask's sum over the generation batch (dapo, cispo, vespo).
      accumulation: micro-batches in this optimizer step. steps_per_generation: micro-batches in a generation batch.
      old_log_probs: [B, T] when the completions were made; None for those of the current policy.
      ref_log_probs: [B, T] of the reference (beta).
      sampling_log_probs: [B, T] as the sampling engine gave them, NaN where it gave none; where given, the terms are
        weighted by old/sampling probability unless options.vllm_importance_sampling_correction is False.
      entropies: [B, T] in nats. entropy_coef: weight of the entropy bonus, None for none.
      train: False in evaluation, which is neither accumulated nor split.

    Returns:
      (loss, metrics), float32 scalars. clip_ratio/low_min and high_max of tokens are NaN where no row has one.

    Raises:
      ValueError: an array that the options need is missing, or shapes do not fit.
    """
    _check(log_probs, advantages, mask, options, num_items, ref_log_probs, entropies, entropy_coef)
    live = mask > 0
    mask = mask.astype(jnp.float32)
    # Not a product with the mask: neither 0·inf nor 0·NaN is 0, in the value or in the gradient.
    clean = lambda x: jnp.where(live, x, 0).astype(jnp.float32)  # noqa: E731
    log_probs = clean(log_probs)
    ref_log_probs, entropies = (None if x is None else clean(x) for x in (ref_log_probs, entropies))
    current = jax.lax.stop_gradient(log_probs)
    old = current if old_log_probs is None else jax.lax.stop_gradient(clean(old_log_probs))
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages  # [B, 1] or [B, T]
    sampling = None if sampling_log_probs is None else jnp.where(live, sampling_log_probs, 0)

    log_ratio = log_probs - old  # [B, T]
    ratio = jnp.exp(_at_level(log_ratio, mask, options))  # [B, T], or [B, 1] for sequences
    weights = None
    if sampling is not None and options.vllm_importance_sampling_correction:
        _check_correction(options)
        weights = importance_ratio(old, sampling, mask, options)
    if options.loss_type == "vespo":
        phi = _vespo_phi(advantages, log_ratio, mask, weights, options)
        terms, metrics = -phi * advantages * log_probs, {"vespo/phi_seq_mean": _mean(phi, mask)}
    else:
        terms, metrics = _ratio_terms(log_probs, ratio, advantages, mask, options)
        terms = terms if weights is None else terms * weights
    if options.off_policy_mask_threshold is not None:
        drift = (old if sampling is None else sampling) - current
        terms = terms * off_policy_mask(advantages, drift, mask, options.off_policy_mask_threshold)
    effective = mask
    if options.top_entropy_quantile < 1:
        effective = high_entropy_mask(entropies, mask, options.top_entropy_quantile)
        terms = terms * effective
    if options.beta:
        kl = _k3(ref_log_probs - log_probs) * (ratio if options.use_bias_correction_kl else 1)
        terms = terms + options.beta * kl
        metrics["kl"] = _mean(kl, mask)
    if entropies is not None:
        metrics["entropy"] = _mean(entropies, mask)

    if not train:
        accumulation = steps_per_generation = 1
    policy_loss, divisor = _aggregate(terms, mask, options, num_items, accumulation, steps_per_generation)
    loss = policy_loss / divisor
    if entropy_coef is not None:
        metrics["policy_loss"] = policy_loss
        bonus = jnp.sum(entropies * effective) / jnp.maximum(jnp.sum(effective), 1)
        loss = loss - entropy_coef * bonus / accumulation
    return loss, metrics


def _check_correction(options: GRPOLossOptions) -> None:
    mode = options.vllm_importance_sampling_mode
    if options.loss_type == "vespo" and mode.startswith("sequence"):
        raise ValueError(
            f"loss_type='vespo' weighs sequences itself: vllm_importance_sampling_mode={mode!r} must be "
            "'token_truncate' or 'token_mask', or vllm_importance_sampling_correction False"
        )


def importance_ratio(
    old: jax.Array, sampling: jax.Array, mask: jax.Array, options: GRPOLossOptions
) -> jax.Array:
    """Probability under the policy that sampled, as the trainer computes it, over what the engine computed.

    token_*: [B, T]; sequence_*: [B, 1], of the whole sequence. *_truncate clips it to clip_min..clip_max; *_mask makes
    it 0 outside. A token whose sampling log-probability is NaN has ratio 1. No gradient.
    """
    gap = jnp.nan_to_num((old - sampling) * mask)
    sequence = options.vllm_importance_sampling_mode.startswith("sequence")
    ratio = jnp.exp(jnp.sum(gap, 1, keepdims=True) if sequence else gap)
    low, high = options.vllm_importance_sampling_clip_min, options.vllm_importance_sampling_clip_max
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if options.vllm_importance_sampling_mode.endswith("truncate"):
        return jax.lax.stop_gradient(jnp.clip(ratio, low, high))
    return jax.lax.stop_gradient(jnp.where((ratio < low) | (ratio > high), 0.0, ratio))


def sampling_metrics(
    old: jax.Array, sampling: jax.Array, mask: jax.Array, options: GRPOLossOptions
) -> Metrics:
    """TRL's sampling/* of a generation batch: |old - sampling| of its tokens, and the importance ratios; 0 of none."""
    live = mask > 0
    gap = jnp.abs(old - sampling)
    ratio = importance_ratio(old, sampling, mask, options)
    summaries = {"sampling/sampling_logp_difference": (gap, live & ~jnp.isnan(gap))}
    counted = live if ratio.shape[1] == mask.shape[1] else jnp.ones(ratio.shape, bool)
    summaries["sampling/importance_sampling_ratio"] = (ratio, counted)
    found = {}
    for name, (x, counted) in summaries.items():
        some = jnp.any(counted)
        found[f"{name}/min"] = jnp.where(some, jnp.min(x, initial=jnp.inf, where=counted), 0)
        found[f"{name}/mean"] = jnp.sum(jnp.where(counted, x, 0)) / jnp.maximum(jnp.sum(counted), 1)
        found[f"{name}/max"] = jnp.where(some, jnp.max(x, initial=-jnp.inf, where=counted), 0)
    del found["sampling/sampling_logp_difference/min"]
    return found


def off_policy_mask(advantages: jax.Array, drift: jax.Array, mask: jax.Array, threshold: float) -> jax.Array:
    """1 where A >= 0 or the sequence's mean log p(sampler)/p is at most the threshold; drift [B, T] may hold NaN."""
    mean = jnp.sum(jnp.nan_to_num(drift) * mask, 1, keepdims=True) / _tokens(mask)[:, None]
    return ((advantages >= 0) | (mean <= threshold)).astype(jnp.float32)


def high_entropy_mask(entropies: jax.Array, mask: jax.Array, share: float) -> jax.Array:
    """1 on the share of the mask's tokens, of the whole micro-batch, whose entropy is highest: float32 [B, T]."""
    live = mask > 0
    threshold = jnp.nanquantile(jnp.where(live, jax.lax.stop_gradient(entropies), jnp.nan), 1 - share)
    return ((entropies >= threshold) & live).astype(jnp.float32)


def active_entropy(
    entropies: jax.Array, mask: jax.Array, options: GRPOLossOptions
) -> tuple[jax.Array, jax.Array]:
    """(sum, count) of the entropies that the bonus acts on; summed over an optimizer step for an adaptive bonus."""
    if options.top_entropy_quantile < 1:
        mask = high_entropy_mask(entropies, mask, options.top_entropy_quantile)
    return jnp.sum(jnp.where(mask > 0, entropies, 0)), jnp.sum(mask > 0).astype(jnp.float32)


def adapted_entropy_coef(
    coef: Number, entropy: Number, *, target: float, delta: float, minimum: float, maximum: float
) -> jax.Array:
    """The next step's entropy_coef: delta up where the step's entropy is at most the target, else delta down.

    (arXiv 2505.22312.) The bonus itself applies only while the last step's entropy is at most the target.
    """
    return jnp.where(
        entropy <= target, jnp.minimum(coef + delta, maximum), jnp.maximum(coef - delta, minimum)
    )


def _tokens(mask: jax.Array) -> jax.Array:
    """Each row's count, at least 1: [B]."""
    return jnp.maximum(jnp.sum(mask, 1), 1)


def _mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Over the mask's tokens, or over the rows where there is one value each."""
    if x.shape[1] == 1:
        return jnp.mean(x)
    return jnp.sum(x * mask) / jnp.maximum(jnp.sum(mask), 1)


def _at_level(log_ratio: jax.Array, mask: jax.Array, options: GRPOLossOptions) -> jax.Array:
    if options.importance_sampling_level == "token":
        return log_ratio
    return (jnp.sum(log_ratio * mask, 1) / _tokens(mask))[:, None]


def _k3(log_ratio: jax.Array) -> jax.Array:
    """Schulman's estimate of the KL divergence from samples of p, given log q/p; never below 0."""
    return jnp.exp(log_ratio) - log_ratio - 1


def _bound(x: jax.Array, low: float, high: float) -> jax.Array:
    """Clipping whose gradient is whole on the bounds, as torch's; jnp.clip halves it there."""
    return jnp.where(x < low, low, jnp.where(x > high, high, x))


def _ratio_terms(
    log_probs: jax.Array,
    ratio: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    options: GRPOLossOptions,
) -> tuple[jax.Array, Metrics]:
    """Terms [B, T] or [B, 1] of every loss but vespo, with the shares that were clipped."""
    if options.loss_type == "cispo":
        weight = jax.lax.stop_gradient(jnp.minimum(ratio, options.high))
        clipped = (ratio > options.high) & (advantages > 0)
        return -weight * advantages * log_probs, {"cispo_clip_ratio": _mean(clipped * 1.0, mask)}
    if options.loss_type == "sapo":
        t = jnp.where(advantages > 0, options.sapo_temperature_pos, options.sapo_temperature_neg)
        return -jax.nn.sigmoid(t * (ratio - 1)) * 4 / t * advantages, {}
    low, high = 1 - options.epsilon, 1 + options.high
    inside = _bound(ratio, low, high)
    ratio = ratio if options.delta is None else _bound(ratio, -math.inf, options.delta)
    terms = -jnp.minimum(ratio * advantages, inside * advantages)
    below, above = (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)
    return terms, {
        "clip_ratio/low_mean": _mean(below * 1.0, mask),
        "clip_ratio/high_mean": _mean(above * 1.0, mask),
        "clip_ratio/region_mean": _mean((below | above) * 1.0, mask),
        "clip_ratio/low_min": jnp.nanmin(_row_means(below * 1.0, mask)),
        "clip_ratio/high_max": jnp.nanmax(_row_means(above * 1.0, mask)),
    }


def _row_means(x: jax.Array, mask: jax.Array) -> jax.Array:
    return x[:, 0] if x.shape[1] == 1 else jnp.sum(x * mask, 1) / jnp.sum(mask, 1)


def _vespo_phi(
    advantages: jax.Array,
    log_ratio: jax.Array,
    mask: jax.Array,
    weights: jax.Array | None,
    options: GRPOLossOptions,
) -> jax.Array:
    """φ(w), its k and λ by the sign of A: [B, 1], or [B, T] for advantages of tokens. No gradient."""
    log_w = jnp.sum(jnp.clip(log_ratio, -20, 20) * mask, 1, keepdims=True)
    if weights is not None:
        log_weights = jnp.clip(jnp.log(weights), LEAST_LOG_WEIGHT, MOST_LOG_WEIGHT)
        log_w += jnp.sum(log_weights * mask, 1, keepdims=True)
    log_w = jnp.clip(log_w, LEAST_LOG_WEIGHT, MOST_LOG_WEIGHT)
    k = jnp.where(advantages >= 0, options.vespo_k_pos, options.vespo_k_neg)
    lam = jnp.maximum(jnp.where(advantages >= 0, options.vespo_lambda_pos, options.vespo_lambda_neg), 1e-4)
    phi = jnp.exp(lam + k * log_w - lam * jnp.exp(log_w))
    return jax.lax.stop_gradient(jnp.nan_to_num(phi, posinf=0.0))


def _aggregate(
    terms: jax.Array,
    mask: jax.Array,
    options: GRPOLossOptions,
    num_items: Number | None,
    accumulation: Number,
    steps_per_generation: Number,
) -> tuple[jax.Array, Number]:
    """(the policy loss that TRL logs, what is left to divide it by)."""
    total = terms * mask  # [B, T]
    kind = options.loss_type
    if kind in PER_ITEM:  # num_items counts a generation batch: its share of one optimizer step
        items = jnp.maximum(num_items, 1) * accumulation / steps_per_generation
        return jnp.sum(total) / items, 1
    if kind in ("grpo", "sapo"):
        return jnp.mean(jnp.sum(total, 1) / _tokens(mask)), accumulation
    if kind == "bnpo":
        return jnp.sum(total) / jnp.maximum(jnp.sum(mask), 1), accumulation
    if kind == "dr_grpo":
        return jnp.sum(total) / (mask.shape[0] * options.max_completion_length), accumulation
    return jnp.mean(jnp.sum(total, 1)), accumulation  # luspo


def _check(log_probs, advantages, mask, options, num_items, ref_log_probs, entropies, entropy_coef) -> None:
    if log_probs.ndim != 2 or mask.shape != log_probs.shape:
        raise ValueError(
            f"expected log_probs and mask of one shape [B, T]; got {log_probs.shape}, {mask.shape}"
        )
    if advantages.shape not in (log_probs.shape[:1], log_probs.shape):
        raise ValueError(
            f"expected advantages {log_probs.shape[:1]} or {log_probs.shape}, got {advantages.shape}"
        )
    if options.loss_type in PER_ITEM and num_items is None:
        raise ValueError(f"loss_type={options.loss_type!r} needs num_items, the generation batch's tokens")
    if options.beta and ref_log_probs is None:
        raise ValueError(f"beta={options.beta} needs ref_log_probs")
    if entropies is None and (entropy_coef is not None or options.top_entropy_quantile < 1):
        raise ValueError("entropy_coef and top_entropy_quantile < 1 need entropies")
