"""From rewards to advantages, as GRPO and GDPO define them: each completion against the others of its prompt.

N completions stand group by group, G of one prompt together; F reward functions. NaN is a function's `None`: it says
nothing about that completion and counts nowhere.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

Scale = Literal["group", "batch", "none"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]

EPSILON = 1e-4  # beside every standard deviation that is divided by
ZERO_STD = 1e-8  # a standard deviation up to this is no signal


class Advantages(NamedTuple):
    """Float32. The scalars and function_* are what TRL logs as reward, reward_std, frac_reward_zero_std, rewards/*."""

    values: jax.Array  # [N], 0 where no function said anything
    rewards: jax.Array  # [N] weighted sums, NaN where no function said anything
    std: (
        jax.Array
    )  # [N] of the row's group, or of the batch where that scales; NaN with fewer than two rewards
    reward: jax.Array  # mean of the rewards
    reward_std: jax.Array
    frac_reward_zero_std: jax.Array  # share of the rows whose std is 0
    function_mean: jax.Array  # [F] over the rows the function said something about
    function_std: jax.Array  # [F]


def nan_std(x: jax.Array, axis: int | None = None, keepdims: bool = False) -> jax.Array:
    """Standard deviation of what is not NaN, with Bessel's correction; NaN with fewer than two numbers."""
    count = jnp.sum(~jnp.isnan(x), axis, keepdims=keepdims)
    return jnp.where(count > 1, jnp.nanstd(x, axis, ddof=1, keepdims=keepdims), jnp.nan)


def compute_advantages(
    rewards: jax.Array,
    weights: jax.Array,
    *,
    group: int,
    scale_rewards: Scale = "group",
    aggregation: Aggregation = "sum_then_normalize",
) -> Advantages:
    """Advantages of N completions, in groups of one prompt.

    sum_then_normalize (GRPO): the functions' weighted sum, less its mean in the group, over its standard deviation in
    the group or the batch (not divided for "none": Dr. GRPO). normalize_then_sum (GDPO, arXiv 2601.05242): each
    function normalised in its group, the weighted sum of those normalised over the batch; scale_rewards has no part.

    Args:
      rewards: [N, F], NaN where a function gave None. weights: [F].
      group: completions a prompt; N is a multiple.
      scale_rewards, aggregation: TRL's names.

    Raises:
      ValueError: shapes that do not fit, or an unknown name.
    """
    rewards, weights = jnp.asarray(rewards, jnp.float32), jnp.asarray(weights, jnp.float32)
    _check(rewards, weights, group, scale_rewards, aggregation)
    silent = jnp.isnan(rewards).all(1)
    weighted_sum = lambda x: jnp.where(silent, jnp.nan, jnp.nansum(x * weights, 1))  # noqa: E731
    raw = weighted_sum(rewards)  # [N]
    if aggregation == "sum_then_normalize":
        by_prompt = raw.reshape(-1, group)
        centred = (by_prompt - jnp.nanmean(by_prompt, 1, keepdims=True)).reshape(-1)
        std = _spread(raw) if scale_rewards == "batch" else _spread(by_prompt, 1).reshape(-1)
        values = centred if scale_rewards == "none" else centred / (std + EPSILON)
    else:
        by_prompt = rewards.reshape(-1, group, rewards.shape[1])
        centred = by_prompt - jnp.nanmean(by_prompt, 1, keepdims=True)
        total = weighted_sum((centred / (_spread(by_prompt, 1) + EPSILON)).reshape(rewards.shape))
        std = _spread(total)
        values = (total - jnp.nanmean(total)) / (std + EPSILON)
    return Advantages(
        values=jnp.where(jnp.isnan(values), 0.0, values),
        rewards=raw,
        std=std,
        reward=jnp.nanmean(raw),
        reward_std=nan_std(raw),
        frac_reward_zero_std=jnp.mean(jnp.abs(std) <= ZERO_STD),
        function_mean=jnp.nanmean(rewards, 0),
        function_std=nan_std(rewards, 0),
    )


def _spread(x: jax.Array, axis: int | None = None) -> jax.Array:
    """Standard deviation along an axis, in x's shape; 0 where one number is all there could be."""
    if (x.size if axis is None else x.shape[axis]) == 1:
        return jnp.zeros_like(x)
    return jnp.broadcast_to(nan_std(x, axis, keepdims=True), x.shape)


def _check(rewards, weights, group, scale_rewards, aggregation) -> None:
    if rewards.ndim != 2 or weights.shape != rewards.shape[1:]:
        raise ValueError(
            f"expected rewards [N, F] and weights [F]; got shapes {rewards.shape} and {weights.shape}: "
            "one column and one weight for each reward function"
        )
    if group < 1 or rewards.shape[0] % group:
        raise ValueError(f"{rewards.shape[0]} rewards do not make whole groups of {group} completions")
    for name, value, kind in (
        ("scale_rewards", scale_rewards, Scale),
        ("aggregation", aggregation, Aggregation),
    ):
        if value not in get_args(kind):
            raise ValueError(f"{name}={value!r}; expected one of {', '.join(map(repr, get_args(kind)))}")
