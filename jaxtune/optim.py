"""Optimizers and learning-rate schedules: optax's AdamW, and an AdamW whose moments are kept in 8 bits."""

import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtune.config import TrainingConfig
from jaxtune.quant import dynamic_map

BLOCK = 256
SMALLEST = 4096  # elements; smaller tensors keep float32 moments, as in bitsandbytes


def make_schedule(kind: str, learning_rate: float, num_steps: int, warmup_steps: int = 0) -> optax.Schedule:
    """Learning rate of optimizer step 0, 1, …, with the numbers of transformers' schedulers.

    Args:
      kind: "linear", "cosine", "constant" or "constant_with_warmup" ("constant" ignores the warm-up).
      learning_rate: the peak.
      num_steps: optimizer steps of the run; linear and cosine reach 0 there.
      warmup_steps: steps of linear rise from 0.
    """
    kinds = ("linear", "cosine", "constant", "constant_with_warmup")
    if kind not in kinds:
        raise ValueError(f"lr_scheduler_type must be one of {', '.join(kinds)}, got {kind!r}")

    def schedule(count):
        count = jnp.asarray(count, jnp.float32)
        progress = jnp.clip((count - warmup_steps) / max(1, num_steps - warmup_steps), 0, 1)
        decay = {"linear": 1 - progress, "cosine": 0.5 * (1 + jnp.cos(math.pi * progress))}.get(kind, 1.0)
        if kind == "constant" or warmup_steps == 0:
            return learning_rate * decay
        return learning_rate * jnp.where(count < warmup_steps, count / warmup_steps, decay)

    return schedule


class Moment(NamedTuple):
    """One moment in 8 bits: uint8 codes [n/256, 256] into a dynamic map, float32 absmax [n/256]."""

    codes: jax.Array
    absmax: jax.Array


class Adam8bitState(NamedTuple):
    """count: steps taken. mu, nu: per leaf a Moment, or the float32 moment of a small leaf."""

    count: jax.Array
    mu: optax.Updates
    nu: optax.Updates


def _compress(x: jax.Array, signed: bool) -> Moment:
    blocks = jnp.pad(x.reshape(-1), (0, -x.size % BLOCK)).reshape(-1, BLOCK)
    absmax = jnp.abs(blocks).max(1)
    scaled = blocks * jnp.where(absmax > 0, 1 / absmax, 0)[:, None]
    code = dynamic_map(signed)
    return Moment(_count_below((code[:-1] + code[1:]) / 2, scaled).astype(jnp.uint8), absmax)


def _zero(size: int, signed: bool) -> Moment:
    """`_compress` of zeros, without a computation that XLA would fold for seconds."""
    blocks, code = -(-size // BLOCK), int(np.argmin(np.abs(dynamic_map(signed))))
    return Moment(jnp.full((blocks, BLOCK), code, jnp.uint8), jnp.zeros(blocks))


def _count_below(bounds: np.ndarray, x: jax.Array) -> jax.Array:
    """How many of the 255 sorted bounds lie below each x, int32: a binary search in one fusion.

    searchsorted's own starts from an array of one and the same index, which XLA folds into a constant as large as x.
    """
    table = jnp.asarray(bounds)
    count = jnp.where(x > bounds[127], 128, 0)
    for step in (64, 32, 16, 8, 4, 2, 1):
        count += jnp.where(x > table[count + (step - 1)], step, 0)
    return count


def _expand(moment: Moment | jax.Array, like: jax.Array, signed: bool) -> jax.Array:
    if not isinstance(moment, Moment):
        return moment
    values = jnp.asarray(dynamic_map(signed))[moment.codes] * moment.absmax[:, None]
    return values.reshape(-1)[: like.size].reshape(like.shape)


def scale_by_adam_8bit(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam's direction, both moments stored block-wise in 8 bits (arXiv 2110.02861): 2 bytes a parameter, not 8.

    The update is taken from the float32 moments, before they are rounded.
    """

    def init(params):
        def zero(p, signed):
            return _zero(p.size, signed) if p.size >= SMALLEST else jnp.zeros_like(p)

        mu, nu = (jax.tree.map(lambda p, s=signed: zero(p, s), params) for signed in (True, False))
        return Adam8bitState(jnp.zeros([], jnp.int32), mu, nu)

    def update(grads, state, params=None):
        del params
        leaves, tree = jax.tree.flatten(grads)
        count = state.count + 1
        bias1, bias2 = 1 - b1**count, 1 - b2**count
        out, mus, nus = [], [], []
        for grad, mu, nu in zip(
            leaves, tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu), strict=True
        ):
            m = b1 * _expand(mu, grad, True) + (1 - b1) * grad
            v = b2 * _expand(nu, grad, False) + (1 - b2) * grad * grad
            out.append((m / bias1) / (jnp.sqrt(v / bias2) + eps))
            mus.append(_compress(m, True) if isinstance(mu, Moment) else m)
            nus.append(_compress(v, False) if isinstance(nu, Moment) else v)
        return tree.unflatten(out), Adam8bitState(count, tree.unflatten(mus), tree.unflatten(nus))

    return optax.GradientTransformation(init, update)


def decays(path: str) -> bool:
    """Whether weight decay applies to a leaf: not to biases and norms."""
    return not (path.endswith(".bias") or re.search(r"norm\d?\.|\.ln_q\.", path))


def _is_embedding(path: str) -> bool:
    return path.endswith("embed_tokens.weight") or path == "lm_head.weight"


def make_optimizer(
    args: TrainingConfig, num_steps: int, trainable: dict[str, jax.Array]
) -> optax.GradientTransformation:
    """AdamW with decoupled weight decay and the schedule of `args`; clipping is the step's.

    Args:
      args: optim, learning_rate, embedding_learning_rate, weight_decay, adam_*, lr_scheduler_type and warm-up.
      num_steps: optimizer steps of the whole run.
      trainable: the leaves to be trained, path -> array or shape.
    """
    adam = scale_by_adam_8bit if args.optim == "adamw_8bit" else optax.scale_by_adam
    schedule = make_schedule(
        args.lr_scheduler_type, args.learning_rate, num_steps, args.num_warmup_steps(num_steps)
    )
    parts = [
        adam(b1=args.adam_beta1, b2=args.adam_beta2, eps=args.adam_epsilon),
        optax.add_decayed_weights(args.weight_decay, mask={path: decays(path) for path in trainable}),
        optax.scale_by_learning_rate(schedule),
    ]
    if args.embedding_learning_rate is not None:
        ratio = args.embedding_learning_rate / args.learning_rate
        parts.append(
            optax.stateless(
                lambda updates, _: {p: u * ratio if _is_embedding(p) else u for p, u in updates.items()}
            )
        )
    return optax.chain(*parts)
