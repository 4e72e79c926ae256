"""The training step and the evaluation step: pure functions of arrays, jitted, differentiated by JAX.

    step(trainable, opt_state, base, batch, key) -> (trainable, opt_state, metrics)

On several devices (devices.Layout) each takes its rows, and the gradients are summed once.

`trainable` and `base` are flat dicts path -> array; the base is an argument and never differentiated. A step takes
G micro-batches [G, B, T] and normalises the loss by the label tokens of all of them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxtune.devices import ONE_DEVICE, ROWS, STEP_ROWS, WHOLE, Layout
from jaxtune.in_place import value_and_grad
from jaxtune.kernels import target
from jaxtune.kernels.cross_entropy import IGNORE, Options, fused_cross_entropy
from jaxtune.models.decoder import CausalLM
from jaxtune.models.layers import fold
from jaxtune.models.names import Leaves, join
from jaxtune.models.remat import Remat

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
TrainStep = Callable[[Leaves, Any, Leaves, Batch, jax.Array], tuple[Leaves, Any, Metrics]]

RECOMPUTE_ALL = Remat()
KEEP_ALL = Remat.parse("none")
NARROW = 2048  # hidden size up to which most kernels of a step leave a part of a GPU idle
TRANSFERS = Path(__file__).with_name("transfers.pbtxt")


class Trainable(Protocol):
    """What a step needs of a model."""

    graphdef: nnx.GraphDef
    module: CausalLM


def targets(labels: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """What each token is to predict, int32 [..., T]: the next token's label where it is of the same document."""
    following = jnp.pad(labels[..., 1:], [(0, 0)] * (labels.ndim - 1) + [(0, 1)], constant_values=IGNORE)
    same = segment_ids[..., 1:] == segment_ids[..., :-1]
    same = jnp.pad(same, [(0, 0)] * (labels.ndim - 1) + [(0, 1)])
    return jnp.where(same, following, IGNORE)


def default_chunk(tokens: int) -> int:
    """Tokens of a batch of so many that are a chunk of the loss: enough to keep a GPU's matrix units busy and no more
    than a part of a small batch, of which the logits would be the largest array; few on a CPU, where the last, partly
    filled chunk costs real time."""
    if target.capability() is None and jax.default_backend() == "cpu":
        return 256
    return min(max(tokens // 8, 512), 1024)


def row_keys(key: jax.Array, batch: Batch) -> jax.Array:
    """A key for each row of a step [G, B], by its place in the step: not by its micro-batch, and not by its device."""
    shape = batch["input_ids"].shape[:2]
    numbers = jnp.arange(shape[0] * shape[1])
    return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers).reshape(shape)


def neftune(x: jax.Array, alpha: float, keys: jax.Array) -> jax.Array:
    """Uniform noise of ±alpha/√(T·D) on embeddings [B, T, D] (NEFTune, arXiv 2310.05914), a key for each row."""
    bound = alpha / (x.shape[1] * x.shape[2]) ** 0.5
    row = lambda key: jax.random.uniform(key, x.shape[1:], jnp.float32, -bound, bound)  # noqa: E731
    return x + jax.vmap(row)(keys).astype(x.dtype)


def loss_sum(
    graphdef: nnx.GraphDef,
    trainable: Leaves,
    base: Leaves,
    batch: Batch,
    *,
    key: jax.Array | None = None,
    neftune_alpha: float | None = None,
    remat: Remat | None = None,
    loss_chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(sum of the label tokens' negative log-likelihood, how many were ranked first) of one batch [B, T].

    key: of noise and dropout, one a row [B]; None: none. Images, where the batch has them: see
    `models.vision_lm.VisionLM.place_images`.
    """
    module = join(graphdef, trainable, base)
    x = module.embed(batch["input_ids"])
    if key is not None and neftune_alpha is not None:
        x = neftune(x, neftune_alpha, fold(key, 0))
    x, how = module.place_images(x, batch, key=None if key is None else fold(key, 2)[0], remat=remat)
    dropout = None if key is None else fold(key, 1)
    hidden, _ = module.hidden(
        x,
        batch["positions"],
        batch["segment_ids"],
        starts=batch.get("starts"),
        key=dropout,
        remat=remat,
        **how,
    )
    want = targets(batch["labels"], batch["segment_ids"]).reshape(-1)
    options = Options(
        chunk=loss_chunk or default_chunk(want.size),
        softcap=module.config.logit_softcap,
        train_head=module.trains_head(),
    )
    with jax.named_scope("loss"):
        return fused_cross_entropy(hidden.reshape(-1, hidden.shape[-1]), module.head(), want, options)


def clip(grads: Leaves, max_norm: float | None) -> tuple[Leaves, jax.Array]:
    """Scales gradients to a global norm of at most `max_norm` (None or 0: not); returns the norm before."""
    norm = optax.global_norm(grads)
    if not max_norm:
        return grads, norm
    factor = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: g * factor, grads), norm


def compiler_options(
    module: CausalLM, remat: Remat, layout: Layout = ONE_DEVICE
) -> dict[str, bool | str | int] | None:
    """XLA's options for a step on a GPU; see docs/benchmarks.md for what each was worth."""
    if target.capability() is None:
        return None
    options: dict[str, bool | str | int] = {
        # The stacks of what is kept are written whole: no need to fill them with zeros first.
        "xla_gpu_enable_dus_accumulator_zero_init_elimination": True,
        # Products are cuBLAS's alone, which write into those stacks (in_place.py) and compile sooner.
        "xla_gpu_enable_triton_gemm": False,
        # cuBLAS's own choice for each: trying them out gains nothing, and takes a head's memory again beside the model.
        "xla_gpu_autotune_level": 0,
        # What is computed again is `remat`'s to say: where memory is short XLA's pass repeats work and frees little.
        "xla_disable_hlo_passes": "rematerialization",
    }
    if module.config.hidden_size <= NARROW and remat == KEEP_ALL and layout == ONE_DEVICE:
        # Kernels that do not wait for each other run at the same time, at the cost of some memory.
        options["xla_gpu_command_buffer_scheduling_mode"] = "CONCURRENT"
    # Transfers run beside the products, which each of these is needed for.
    if remat.offload or layout.fsdp > 1:
        options |= {
            "xla_gpu_enable_latency_hiding_scheduler": True,
            # A transfer starts as early as it can, and is waited for where its result is used.
            "xla_gpu_pgle_profile_file_or_directory_path": str(TRANSFERS),
            "xla_gpu_pgle_accuracy_checker": "PGLE_STRICTNESS_LEVEL_OFF",  # the file knows transfers alone
        }
    if remat.offload:
        options |= {
            # A layer's input is fetched while the layer above is worked on.
            "xla_gpu_enable_pipelined_host_offloading": True,
            # By the second, copies of single numbers would queue behind the large ones, on the same few streams; by the
            # third, what a layer keeps would leave within the next layer, which would wait for it.
            "xla_disable_hlo_passes": "rematerialization,dynamic-slice-copy-fusion-async-wrapper,"
            "collective-pipeliner-forward",
            # A CUDA graph runs its copies and kernels one after another.
            "xla_gpu_enable_command_buffer": "",
        }
    if layout.fsdp > 1:
        options |= {
            # A layer's codes are gathered in one piece, while the layer before is worked on.
            "xla_gpu_pipeline_all_gather": "2",  # on; compiler options take the number
            "xla_gpu_all_gather_combine_threshold_bytes": layout.turn_bytes(module),
            # The head's is under way during the whole forward pass, beside those of the layers.
            "xla_gpu_experimental_parallel_collective_overlap_limit": 2,
        }
    return options


def jit_step(step: TrainStep, model: Trainable, remat: Remat, layout: Layout) -> Any:
    """A training step, jitted: its first two arguments are donated, and what it returns lies whole on every device."""
    return jax.jit(
        step,
        donate_argnums=(0, 1),
        out_shardings=layout.sharding(),
        compiler_options=compiler_options(model.module, remat, layout),
    )


def jit_forward(program: Callable[..., Any], model: Trainable, layout: Layout = ONE_DEVICE) -> Any:
    """A program that runs the model forward, jitted with a step's options; what it returns lies whole on every
    device."""
    return jax.jit(
        program,
        out_shardings=layout.sharding(),
        compiler_options=compiler_options(model.module, RECOMPUTE_ALL, layout),
    )


def make_train_step(
    model: Trainable,
    optimizer: optax.GradientTransformation,
    *,
    max_grad_norm: float | None = 1.0,
    neftune_alpha: float | None = None,
    remat: Remat = RECOMPUTE_ALL,
    loss_chunk: int | None = None,
    layout: Layout = ONE_DEVICE,
) -> TrainStep:
    """The jitted training step of a model; compiled once for each batch shape.

    Args:
      model: gives the module.
      optimizer: acts on the flat trainable leaves.
      max_grad_norm: clip to this global norm.
      neftune_alpha: strength of embedding noise, None for none.
      remat: what each layer keeps for the backward pass; by default its input alone.
      loss_chunk: tokens whose logits exist at a time; None chooses for the machine.
      layout: where the arguments lie; the result is the same on every one, up to the order of sums.

    Returns:
      step(trainable, opt_state, base, batch [G, B, T], key) -> (trainable, opt_state, metrics). The first two are
      donated. metrics, float32 scalars: loss (mean over the step's label tokens), grad_norm (before clipping),
      num_tokens (not padding), num_items (label tokens), accuracy.
    """
    graphdef = layout.graphdef(model.module)

    def gradients(trainable, base, batch, keys, denominator):
        """(gradients, loss, correct) of all devices' rows, from this device's [G, B, T]."""

        def loss_fn(trainable, micro, key):
            loss, correct = loss_sum(
                graphdef,
                trainable,
                base,
                micro,
                key=key,
                neftune_alpha=neftune_alpha,
                remat=remat,
                loss_chunk=loss_chunk,
            )
            return loss / denominator, correct

        def accumulate(carry, inputs):
            micro, key = inputs
            (loss, correct), grads = value_and_grad(loss_fn, has_aux=True)(trainable, micro, key)
            return jax.tree.map(jnp.add, carry, (grads, loss, correct)), None

        start = (jax.tree.map(jnp.zeros_like, trainable), jnp.float32(0), jnp.float32(0))
        return layout.sum(jax.lax.scan(accumulate, start, (batch, keys))[0])

    def step(trainable, opt_state, base, batch, key):
        items = jnp.sum(targets(batch["labels"], batch["segment_ids"]) != IGNORE)
        denominator = jnp.maximum(items, 1).astype(jnp.float32)
        specs = (WHOLE, layout.specs(model.module, base), STEP_ROWS, STEP_ROWS, WHOLE)
        summed = layout.spread(gradients, specs, WHOLE)
        grads, loss, correct = summed(trainable, base, batch, row_keys(key, batch), denominator)
        grads, norm = clip(grads, max_grad_norm)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, opt_state, trainable)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "num_tokens": jnp.sum(batch["segment_ids"] != 0).astype(jnp.float32),
            "num_items": items.astype(jnp.float32),
            "accuracy": correct / denominator,
        }
        return optax.apply_updates(trainable, updates), opt_state, metrics

    return jit_step(step, model, remat, layout)


def make_eval_step(
    model: Trainable, *, loss_chunk: int | None = None, layout: Layout = ONE_DEVICE
) -> Callable[[Leaves, Leaves, Batch], Metrics]:
    """The jitted evaluation of a batch [B, T]: float32 scalars loss_sum, num_items, correct."""
    graphdef = layout.graphdef(model.module)

    def sums(trainable, base, batch):
        loss, correct = loss_sum(graphdef, trainable, base, batch, loss_chunk=loss_chunk)
        items = jnp.sum(targets(batch["labels"], batch["segment_ids"]) != IGNORE)
        return layout.sum({"loss_sum": loss, "num_items": items.astype(jnp.float32), "correct": correct})

    def evaluate(trainable, base, batch):
        specs = (WHOLE, layout.specs(model.module, base), ROWS)
        return layout.spread(sums, specs, WHOLE)(trainable, base, batch)

    return jit_forward(evaluate, model, layout)
