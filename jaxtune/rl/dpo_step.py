"""The DPO step: a pure function of arrays, jitted.

    step(trainable, opt_state, base, batch [G, 2B, T], key) -> (trainable, opt_state, metrics)

Rows 2i and 2i + 1 of a micro-batch are pair i: the chosen completion and the rejected one, each behind its prompt.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtune.devices import ONE_DEVICE, ROWS, WHOLE, Layout
from jaxtune.kernels.cross_entropy import IGNORE, Options, TokenScores, token_scores
from jaxtune.models.decoder import CausalLM
from jaxtune.models.layers import fold
from jaxtune.models.names import Leaves, join
from jaxtune.models.remat import Remat
from jaxtune.rl.losses.dpo import DPOLossOptions, dpo_loss, sequence_log_probs
from jaxtune.rl.reference import without_adapter
from jaxtune.rl.step import update
from jaxtune.step import (
    RECOMPUTE_ALL,
    Batch,
    Trainable,
    TrainStep,
    default_chunk,
    jit_forward,
    jit_step,
    targets,
)

Metrics = dict[str, jax.Array]
# What the model reads of a batch; the rest is for the loss.
MODEL_INPUTS = "input_ids labels positions segment_ids starts image_slots images rope_positions".split()


class Scored(NamedTuple):
    """What the model says of B pairs: [2B, T], the chosen rows first. mask is 1 where a completion is predicted."""

    tokens: TokenScores
    mask: jax.Array


def score(
    model: Trainable,
    trainable: Leaves,
    base: Leaves,
    batch: Batch,
    *,
    key: jax.Array | None = None,
    layout: Layout = ONE_DEVICE,
    **how: Any,
) -> Scored:
    """Scores of the tokens that have a label, each where it is predicted; every device runs the model on its rows.

    Args:
      batch: input_ids, labels, positions, segment_ids int32 [2B, T], starts int32 [2B, 1], and what
        `models.vision_lm.VisionLM.place_images` takes where there are images; the rows of a pair together.
      key: of dropout, one a row; None: none. how: remat and chunk, what the backward pass keeps, and tokens whose
        logits exist at a time.
    """
    graphdef = layout.graphdef(model.module)
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}

    def own(trainable, base, batch, key):
        return _score_rows(join(graphdef, trainable, base), batch, key, **how)

    specs = (WHOLE, layout.specs(model.module, base), ROWS, ROWS)
    return jax.tree.map(_halves, layout.spread(own, specs, ROWS)(trainable, base, inputs, key))


def _score_rows(
    module: CausalLM,
    batch: Batch,
    key: jax.Array | None,
    remat: Remat | None = None,
    chunk: int | None = None,
) -> Scored:
    """`score`, in the order of the batch."""
    of_tower = None if key is None else fold(key, 2)[0]
    x, placed = module.place_images(module.embed(batch["input_ids"]), batch, key=of_tower, remat=remat)
    hidden, _ = module.hidden(
        x,
        batch["positions"],
        batch["segment_ids"],
        starts=batch["starts"],
        key=key,
        remat=remat,
        **placed,
    )
    want = targets(batch["labels"], batch["segment_ids"])
    options = Options(
        chunk=chunk or default_chunk(want.size),
        softcap=module.config.logit_softcap,
        train_head=module.trains_head(),
    )
    with jax.named_scope("scores"):
        found = token_scores(hidden.reshape(-1, hidden.shape[-1]), module.head(), want.reshape(-1), options)
    return Scored(jax.tree.map(lambda x: x.reshape(want.shape), found), (want != IGNORE).astype(jnp.float32))


def _halves(x: jax.Array) -> jax.Array:
    """[2B, …] with pairs together -> first the chosen rows, then the rejected ones."""
    return jnp.concatenate([x[0::2], x[1::2]])


def pair_log_probs(scored: Scored, options: DPOLossOptions) -> jax.Array:
    """[2B], the chosen rows first."""
    return sequence_log_probs(scored.tokens.log_probs, scored.mask, options.ld_alpha)


def preference_loss(
    model: Trainable,
    trainable: Leaves,
    base: Leaves,
    reference: Leaves | None,
    batch: Batch,
    options: DPOLossOptions,
    *,
    key: jax.Array | None = None,
    remat: Remat | None = None,
    **how: Any,
) -> tuple[jax.Array, Metrics]:
    """(loss, metrics) of one micro-batch, the metrics with TRL's names and NaN where it has no pair.

    Args:
      reference: what is trained, as it was at the start; None: the reference is the model without its adapter.
      batch: what `score` takes and, instead of running the reference, ref_log_probs float32 [2B, 1].
      key, remat, how: for `score`; how (chunk, layout) for that of the reference too.
    """
    scored = score(model, trainable, base, batch, key=key, remat=remat, **how)
    if "ref_log_probs" in batch:
        ref = _halves(batch["ref_log_probs"][:, 0])
    else:
        leaves = (trainable, without_adapter(base)) if reference is None else (reference, base)
        ref = pair_log_probs(score(model, *jax.lax.stop_gradient(leaves), batch, **how), options)
    loss, metrics = dpo_loss(
        scored.tokens.log_probs, scored.mask, ref, options, log_sum_sq_probs=scored.tokens.log_sum_sq_probs
    )
    return loss, metrics | _token_metrics(scored)


def _token_metrics(scored: Scored) -> Metrics:
    tokens, both = scored.tokens, scored.mask
    first = jnp.arange(len(both))[:, None] < len(both) // 2
    chosen, rejected = both * first, both * ~first
    mean = lambda x, mask: jnp.sum(x * mask) / jnp.sum(mask)  # noqa: E731
    return {
        "entropy": mean(tokens.entropies, both),
        "logits/chosen": mean(tokens.mean_logits, chosen),
        "logits/rejected": mean(tokens.mean_logits, rejected),
        "mean_token_accuracy": mean(tokens.correct, chosen),
    }


def make_dpo_step(
    model: Trainable,
    optimizer: optax.GradientTransformation,
    options: DPOLossOptions,
    *,
    max_grad_norm: float | None = 1.0,
    dropout: bool = False,
    remat: Remat = RECOMPUTE_ALL,
    chunk: int | None = None,
    layout: Layout = ONE_DEVICE,
) -> TrainStep:
    """The jitted DPO step of a model; compiled once for each batch shape.

    Args:
      options: of the loss.
      dropout: whether the adapter's dropout is on.
      remat, chunk: what the backward pass keeps; tokens whose logits exist at a time.
      layout: where the arguments lie.

    Returns:
      step(trainable, opt_state, base, batch, key) -> (trainable, opt_state, metrics), the first two donated. batch:
      what `preference_loss` takes, [G, 2B, T]; accumulation [G], how many of the micro-batches have pairs; and, where
      the reference is not the model without its adapter, reference: its leaves. metrics: loss (mean over the
      micro-batches that have pairs), grad_norm, num_tokens, and those of preference_loss, [G] each.
    """

    def step(trainable, opt_state, base, batch, key):
        batch = dict(batch)
        reference = batch.pop("reference", None)

        def loss_fn(trainable, micro, key):
            key = key if dropout else None
            how: dict[str, Any] = {"key": key, "remat": remat, "chunk": chunk, "layout": layout}
            loss, metrics = preference_loss(model, trainable, base, reference, micro, options, **how)
            return loss / micro["accumulation"], metrics

        return update(loss_fn, optimizer, max_grad_norm, trainable, opt_state, batch, key)

    return jit_step(step, model, remat, layout)


def make_dpo_eval(
    model: Trainable, options: DPOLossOptions, *, chunk: int | None = None
) -> Callable[[Leaves, Leaves, Leaves | None, Batch], Metrics]:
    """The jitted loss and metrics of one batch [2B, T]: (trainable, base, reference, batch) -> float32 scalars."""

    def evaluate(trainable, base, reference, batch):
        loss, metrics = preference_loss(model, trainable, base, reference, batch, options, chunk=chunk)
        return metrics | {"loss": loss}

    return jit_forward(evaluate, model)


def make_pair_log_probs(
    model: Trainable, options: DPOLossOptions, *, chunk: int | None = None
) -> Callable[[Leaves, Leaves, Batch], jax.Array]:
    """The jitted log-probabilities of the completions of a batch [2B, T]: float32 [B, 2], chosen and rejected."""

    def log_probs(trainable, base, batch):
        return pair_log_probs(score(model, trainable, base, batch, chunk=chunk), options).reshape(2, -1).T

    return jit_forward(log_probs, model)
