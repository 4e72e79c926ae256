"""The score function and the GRPO step: pure functions of arrays, jitted.

    score(trainable, base, batch [M, B, T]) -> log-probabilities [M, B, T]
    step(trainable, opt_state, base, batch [A, B, T], key) -> (trainable, opt_state, metrics)

A row of a batch is a prompt, its completion and padding, and what belongs to a completion's token stands where that
token is predicted, one place before it; or a prompt stands once before its completions (groups.GroupCollator). What
predicts nothing is left out of the head's product, so the prompt costs no logits.

On several devices each runs the model on its rows; the loss is one of all rows, so that it is that of one device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxtune.devices import ONE_DEVICE, ROWS, STEP_ROWS, WHOLE, Layout
from jaxtune.in_place import value_and_grad
from jaxtune.kernels.cross_entropy import IGNORE, Options, token_log_probs
from jaxtune.models.decoder import CausalLM
from jaxtune.models.layers import fold
from jaxtune.models.names import Leaves, join
from jaxtune.models.remat import Remat
from jaxtune.models.shared_prefix import SharedPrefix
from jaxtune.rl.losses.grpo import active_entropy, grpo_loss
from jaxtune.rl.losses.options import GRPOLossOptions
from jaxtune.step import (
    RECOMPUTE_ALL,
    Batch,
    Trainable,
    TrainStep,
    clip,
    default_chunk,
    jit_forward,
    jit_step,
    row_keys,
)

Score = Callable[[Leaves, Leaves, Batch], jax.Array]
# What the model reads of a batch; the rest is for the loss.
MODEL_INPUTS = frozenset(
    """input_ids positions segment_ids starts mask row_positions row_segments row_starts
    image_slots images rope_positions""".split()
)


def log_probs(
    graphdef: nnx.GraphDef,
    trainable: Leaves,
    base: Leaves,
    batch: Batch,
    temperature: float,
    *,
    key: jax.Array | None = None,
    remat: Remat | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(log-probabilities, entropies) float32 [B, T] of the tokens that follow where batch["mask"] is not 0; else 0.

    Args:
      batch: as experience.Collator or groups.GroupCollator lays it out, with images as images.ImageCollator adds them;
        one micro-batch.
      temperature: logits are divided by it.
      key: of dropout, one a row of input_ids; None: none.
      chunk: tokens whose logits exist at a time.
    """
    module = join(graphdef, trainable, base)
    hidden, ids = _predictors(module, batch, key, remat)
    want = jnp.where(batch["mask"] != 0, ids, IGNORE)
    options = Options(
        chunk=chunk or default_chunk(want.size),
        softcap=module.config.logit_softcap,
        temperature=temperature,
        train_head=module.trains_head(),
    )
    with jax.named_scope("log_probs"):
        found = token_log_probs(
            hidden.reshape(-1, hidden.shape[-1]), module.head(), want.reshape(-1), options
        )
    chosen, entropies = (x.reshape(want.shape) for x in found)
    return chosen, entropies


def _predictors(
    module: CausalLM, batch: Batch, key: jax.Array | None, remat: Remat | None
) -> tuple[jax.Array, jax.Array]:
    """(hidden states [B, T, D], the tokens int32 [B, T] that they predict), places as in batch["mask"]."""
    ids, of_tower = batch["input_ids"], None if key is None else fold(key, 2)[0]
    x, how = module.place_images(module.embed(ids), batch, key=of_tower, remat=remat)
    how |= {"key": key, "remat": remat}
    if "row_positions" not in batch:
        hidden, _ = module.hidden(x, batch["positions"], batch["segment_ids"], starts=batch["starts"], **how)
        return hidden, jnp.pad(ids[:, 1:], ((0, 0), (0, 1)))
    height, completion = batch["mask"].shape
    copies = height // ids.shape[0]
    layout = (batch["row_positions"], batch["row_segments"], batch["row_starts"])
    shared = SharedPrefix(ids.shape[1] - copies * completion, copies, *layout)
    hidden, _ = module.hidden(x, batch["positions"], batch["segment_ids"], shared=shared, **how)
    return shared.predictors(hidden), ids[:, shared.prompt :].reshape(height, completion)


def model_inputs(batch: Batch) -> Batch:
    return {name: array for name, array in batch.items() if name in MODEL_INPUTS}


def make_score(
    model: Trainable, temperature: float, *, chunk: int | None = None, layout: Layout = ONE_DEVICE
) -> Score:
    """The jitted log-probabilities of M micro-batches, one after the other; no dropout, nothing is differentiated."""
    graphdef = layout.graphdef(model.module)

    def scores(trainable, base, batch):
        one = lambda micro: log_probs(graphdef, trainable, base, micro, temperature, chunk=chunk)[0]  # noqa: E731
        return jax.lax.map(one, batch)

    def score(trainable, base, batch):
        specs = (WHOLE, layout.specs(model.module, base), STEP_ROWS)
        return layout.spread(scores, specs, STEP_ROWS)(trainable, base, model_inputs(batch))

    return jit_forward(score, model, layout)


def policy_loss(
    model: Trainable,
    trainable: Leaves,
    base: Leaves,
    batch: Batch,
    loss: GRPOLossOptions,
    temperature: float,
    *,
    steps_per_generation: int,
    train: bool,
    key: jax.Array | None = None,
    layout: Layout = ONE_DEVICE,
    **how: Any,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss, metrics) of one micro-batch [B, T]; key and `how` go to log_probs. See make_grpo_step for the batch."""
    graphdef = layout.graphdef(model.module)

    def own(trainable, base, batch, key):
        return log_probs(graphdef, trainable, base, batch, temperature, key=key, **how)

    specs = (WHOLE, layout.specs(model.module, base), ROWS, ROWS)
    new, entropies = layout.spread(own, specs, ROWS)(trainable, base, model_inputs(batch), key)
    value, metrics = grpo_loss(
        new,
        batch["advantages"],
        batch["mask"],
        loss,
        num_items=batch["num_items"],
        accumulation=batch["accumulation"],
        steps_per_generation=steps_per_generation,
        old_log_probs=batch.get("old_log_probs"),
        ref_log_probs=batch.get("ref_log_probs"),
        sampling_log_probs=batch.get("sampling_log_probs"),
        entropies=entropies,
        entropy_coef=batch.get("entropy_coef"),
        train=train,
    )
    if "entropy_coef" in batch:
        total, count = active_entropy(entropies, batch["mask"], loss)
        metrics = {**metrics, "entropy_sum": total, "entropy_count": count}
    return value, metrics


def update(
    loss_fn: Callable[[Leaves, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]],
    optimizer: optax.GradientTransformation,
    max_grad_norm: float | None,
    trainable: Leaves,
    opt_state: Any,
    batch: Batch,
    key: jax.Array,
) -> tuple[Leaves, Any, dict[str, jax.Array]]:
    """One optimizer step by the sum of its micro-batches' gradients.

    Args:
      loss_fn: (trainable, micro-batch, key) -> (loss, metrics).
      batch: arrays with the micro-batches in front, among them segment_ids.
      key: each row of input_ids gets one of its own.

    Returns:
      (trainable, opt_state, metrics): loss (the sum), grad_norm before clipping, num_tokens, and what loss_fn gives:
      one value a micro-batch.
    """

    def accumulate(carry, inputs):
        micro, key = inputs
        (value, metrics), grads = value_and_grad(loss_fn, has_aux=True)(trainable, micro, key)
        return jax.tree.map(jnp.add, carry, (grads, value)), metrics

    start = (jax.tree.map(jnp.zeros_like, trainable), jnp.float32(0))
    (grads, value), metrics = jax.lax.scan(accumulate, start, (batch, row_keys(key, batch)))
    grads, norm = clip(grads, max_grad_norm)
    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(grads, opt_state, trainable)
    metrics |= {
        "loss": value,
        "grad_norm": norm,
        "num_tokens": jnp.sum(batch["segment_ids"] != 0).astype(jnp.float32),
    }
    return optax.apply_updates(trainable, updates), opt_state, metrics


def make_grpo_step(
    model: Trainable,
    optimizer: optax.GradientTransformation,
    loss: GRPOLossOptions,
    *,
    temperature: float,
    steps_per_generation: int,
    max_grad_norm: float | None = 1.0,
    dropout: bool = True,
    remat: Remat = RECOMPUTE_ALL,
    chunk: int | None = None,
    layout: Layout = ONE_DEVICE,
) -> TrainStep:
    """The jitted GRPO step of a model; compiled once for each batch shape.

    Args:
      loss: of a micro-batch; already divided so that the sum over micro-batches is the step's.
      temperature: logits are divided by it.
      steps_per_generation: micro-batches of a generation.
      dropout: whether the adapter's dropout is on.
      remat, chunk: what the backward pass keeps; tokens whose logits exist at a time.
      layout: where the arguments lie.

    Returns:
      step(trainable, opt_state, base, batch, key) -> (trainable, opt_state, metrics), the first two donated. batch:
      what `log_probs` takes, [A, B, T]; advantages [A, B]; num_items, accumulation and, with an entropy bonus,
      entropy_coef [A]; old_log_probs, ref_log_probs, sampling_log_probs [A, B, T] where the loss needs them.
      metrics: loss, grad_norm, num_tokens, and those of grpo_loss, [A] each.
    """

    def loss_fn(trainable, base, micro, key):
        return policy_loss(
            model,
            trainable,
            base,
            micro,
            loss,
            temperature,
            steps_per_generation=steps_per_generation,
            train=True,
            key=key if dropout else None,
            remat=remat,
            chunk=chunk,
            layout=layout,
        )

    def step(trainable, opt_state, base, batch, key):
        loss_of = lambda trainable, micro, key: loss_fn(trainable, base, micro, key)  # noqa: E731
        return update(loss_of, optimizer, max_grad_norm, trainable, opt_state, batch, key)

    return jit_step(step, model, remat, layout)


def make_grpo_eval(
    model: Trainable,
    loss: GRPOLossOptions,
    *,
    temperature: float,
    chunk: int | None = None,
    layout: Layout = ONE_DEVICE,
) -> Callable[[Leaves, Leaves, Batch], dict[str, jax.Array]]:
    """The jitted loss and metrics of one batch [B, T], as TRL computes them in evaluation."""

    def evaluate(trainable, base, batch):
        value, metrics = policy_loss(
            model,
            trainable,
            base,
            batch,
            loss,
            temperature,
            steps_per_generation=1,
            train=False,
            chunk=chunk,
            layout=layout,
        )
        return {**metrics, "loss": value}

    return jit_forward(evaluate, model, layout)
