"""Each kernel of a step by itself on a GPU: its time beside the plain version's and beside the machine's limit.

    python scripts/bench/kernels.py [--rows 4096 8192] [--only linear attention]

The limit of a line is the larger of its bytes over the copy bandwidth and its operations over the rate of products of
its dtype, both measured first on the same machine. Shapes are Llama-3.1-8B's. `plain` is a kernel's reference in XLA,
`shipped` what jaxtune runs on this GPU: the kernel on an H100 or H200. `decode` and `decode_attention` are the few rows
of generation (--decode_rows; a minute and more for each): `one` is [14336, 4096] alone, `bare` without adapters. They
and `matrix` are chained in one program over weights or caches that rotate, so that none is left in the cache and no
launch from Python is timed. --profile adds the kernels that a line consists of and the gaps between them, without CUDA
graphs, which hide the names: a line then takes longer.

The plain loss takes as many rows as fit into the GPU's memory; for the rest give fewer --rows to a small GPU.
"""

import argparse
import collections
import json
import math
import os
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import measuring
import numpy as np
import overlap

from jaxtune.kernels import decode_attention, fp8, linear, nf4_matrix, swiglu, swiglu8
from jaxtune.kernels.attention import cudnn_attention, masked_attention
from jaxtune.kernels.cross_entropy import Options, fused_cross_entropy, token_log_probs
from jaxtune.kernels.fp8_mlp import fp8_gated_mlp
from jaxtune.kernels.gated_mlp import gated_mlp
from jaxtune.kernels.linear import Adapter, adapted_linear, dense, reference
from jaxtune.kernels.nf4_matmul import fold
from jaxtune.quant import NF4, dequantize_absmax

D, F, HEADS, KV, H, VOCAB, RANK = 4096, 14336, 32, 8, 128, 128256, 16
GROUPS = {"qkv": (D, (D, KV * H, KV * H)), "o": (D, (D,)), "gate_up": (D, (F, F)), "down": (F, (D,))}


class Case(NamedTuple):
    """Something to time: a function of arrays, its operations and the fewest bytes that it must move."""

    name: str
    call: Callable
    arguments: tuple
    flops: float
    moved: float
    repeats: int = 1  # how often a call does it
    rate: str = "bf16"  # the ceiling of its products


def random(seed: int, *shape: int, dtype=jnp.bfloat16) -> jax.Array:
    return (0.05 * jax.random.normal(jax.random.key(seed), shape, jnp.float32)).astype(dtype)


def nf4(seed: int, out: int, width: int) -> NF4:
    """Random codes and double-quantised scales."""
    keys = jax.random.split(jax.random.key(seed), 2)
    codes = jax.random.bits(keys[0], (out, width // 2), jnp.uint8)
    scales = jax.random.bits(keys[1], (out, width // 64), jnp.uint8)
    groups = -(-scales.size // 256)
    return NF4(codes, scales, jnp.full(groups, 0.01, jnp.float32), jnp.float32(0.02))


def single_quantised(weight: NF4) -> NF4:
    """With float32 scales, as `generate` keeps them."""
    return NF4(weight.codes, dequantize_absmax(weight))


def layers(width: int, outs: tuple[int, ...]) -> tuple[tuple[NF4, ...], tuple[Adapter, ...]]:
    """Weights that share an input, and their adapters."""
    adapters = (Adapter(random(i + 10, width, RANK), random(i + 20, RANK, out)) for i, out in enumerate(outs))
    return frozen(width, outs), tuple(adapters)


def frozen(width: int, outs: tuple[int, ...], copy: int = 0) -> tuple[NF4, ...]:
    return tuple(nf4(9 * copy + i, out, width) for i, out in enumerate(outs))


def differentiated(function: Callable) -> Callable:
    """Forward and backward with a given cotangent."""

    def both(dy, *arguments):
        y, vjp = jax.vjp(function, *arguments)
        return y, vjp(dy)

    return both


def size(tree) -> float:
    """Bytes of arrays or shapes."""
    return float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))


def room() -> float:
    """Bytes of this GPU that programs may have."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)


def layer_cases(
    name: str, product: Callable, dy, arguments: tuple, flops: float, rate: str = "bf16"
) -> Iterator[Case]:
    """A product of (x, weights, adapters) forward, and with the gradients of x and the adapters for a given dy."""

    def step(dy, x, weights, adapters):
        return differentiated(lambda x, adapters: product(x, weights, adapters))(dy, x, adapters)

    moved = size((arguments[:2], dy))
    yield Case(name, product, arguments, flops, moved, rate=rate)
    yield Case(f"{name}, both ways", step, (dy, *arguments), 2 * flops, 2 * moved, rate=rate)


def linear_cases(rows: int) -> Iterator[Case]:
    for name, (width, outs) in GROUPS.items():
        total = sum(outs)
        weights, adapters = layers(width, outs)
        stored = size(weights)
        x, w = random(1, rows, width), random(3, total, width)
        dys = [random(2 + i, rows, out) for i, out in enumerate(outs)]
        dy, arguments, flops = (
            jnp.concatenate(dys, axis=1),
            (x, weights, adapters),
            2.0 * rows * total * width,
        )
        yield Case(f"{name}: dequantise", lambda weights: [dense(w, jnp.bfloat16) for w in weights],
                   (weights,), 0, stored + 2 * total * width)  # fmt: skip
        moved = 2.0 * (x.size + dy.size) + stored
        yield Case(f"{name}: dense product", lambda x, w: x @ w.T, (x, w), flops, moved)
        yield from layer_cases(f"{name}: two products", reference, dy, arguments, flops)
        yield from layer_cases(f"{name}: joined", adapted_linear, dy, arguments, flops)
        yield from layer_cases(f"{name}: fp8", fp8.fp8_linear, dys, arguments, flops, "fp8")


def three_layers(x: jax.Array, weights: tuple, adapters: tuple) -> jax.Array:
    """The plain version of an MLP."""
    gate, up = jnp.split(reference(x, weights[:2], adapters[:2]), 2, axis=-1)
    return reference(jax.nn.silu(gate) * up, weights[2:], adapters[2:])


def mlp_cases(rows: int) -> Iterator[Case]:
    """With gate and up kept for the backward pass."""
    first, last = layers(*GROUPS["gate_up"]), layers(*GROUPS["down"])
    arguments = (random(1, rows, D), first[0] + last[0], first[1] + last[1])
    dy, flops = random(2, rows, D), 6.0 * rows * D * F
    yield from layer_cases("mlp: three plain layers", three_layers, dy, arguments, flops)
    yield from layer_cases("mlp: gated_mlp", gated_mlp, dy, arguments, flops)
    yield from layer_cases("mlp: fp8_gated_mlp", fp8_gated_mlp, dy, arguments, flops, "fp8")


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array, documents: int) -> jax.Array:
    """Of rows of so many documents of one length, by XLA."""
    token = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
    document, position = jnp.divmod(token, q.shape[1] // documents)
    return masked_attention(q, k, v, q_positions=position, q_segments=document, window=None)


def attention_cases(rows: int) -> Iterator[Case]:
    for batch, tokens, documents in ((max(1, rows // 2048), 2048, 1), (1, rows, 1), (1, rows, 16)):
        q, k, v = (random(i, batch, tokens, heads, H) for i, heads in enumerate((HEADS, KV, KV)))
        starts = np.broadcast_to(np.arange(documents) * (tokens // documents), (batch, documents)).astype(
            np.int32
        )
        given = starts if documents > 1 else None
        versions = {
            "cuDNN": lambda q, k, v, given=given: cudnn_attention(q, k, v, given, None),
            "plain": partial(plain_attention, documents=documents),
        }
        flops = 2.0 * batch * HEADS * tokens * (tokens / documents) * H
        moved = 2.0 * 2 * (q.size + k.size)
        for label, call in versions.items():
            name = f"attention {batch}x{tokens}, {documents} documents: {label}"
            yield Case(name, call, (q, k, v), flops, moved)
            yield Case(f"{name}, both ways", differentiated(call), (q, q, k, v), 3.5 * flops, 3 * moved)


def plain_log_probs(hidden: jax.Array, head: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`token_log_probs` by all logits at once."""
    log_p = jax.nn.log_softmax((hidden @ head.T).astype(jnp.float32))
    return jnp.take_along_axis(log_p, labels[:, None], 1)[:, 0], -jnp.sum(jnp.exp(log_p) * log_p, axis=1)


def loss_cases(rows: int) -> Iterator[Case]:
    """Limits: two products of the loss with its gradient, three where the logits are made again."""
    hidden, head = random(1, rows, D), random(2, VOCAB, D)
    labels = jax.random.randint(jax.random.key(3), (rows,), 0, VOCAB)
    arguments, moved, product = (
        (hidden, head, labels),
        2.0 * (2 * hidden.size + head.size),
        2.0 * rows * D * VOCAB,
    )

    def loss(options):
        return jax.grad(lambda h, w, y: fused_cross_entropy(h, w, y, options)[0])

    def log_probs(h, w, y):
        return token_log_probs(h, w, y, Options())

    def both_ways(log_probs):
        return jax.grad(lambda h, w, y: jnp.sum(log_probs(h, w, y)[0] ** 2))

    for chunk in (512, 1024, 2048):
        yield Case(f"loss, chunks of {chunk}", loss(Options(chunk=chunk)), arguments, 2 * product, moved)
    some = (hidden, head, jnp.where(jnp.arange(rows) % 4 == 0, labels, -100))
    yield Case("loss, a quarter labelled", loss(Options()), some, product / 2, moved)
    yield Case("log-probabilities", log_probs, arguments, product, moved - 2.0 * hidden.size)
    yield Case("log-probabilities, both ways", both_ways(log_probs), arguments, 3 * product, moved)

    fit = rows
    while 6 * 4 * fit * VOCAB > room():  # bytes: logits in float32 and what is made of them
        fit //= 2
    few, product = (hidden[:fit], head, labels[:fit]), 2.0 * fit * D * VOCAB
    plain_loss = jax.grad(lambda h, w, y: -jnp.sum(plain_log_probs(h, w, y)[0]))
    moved = 2.0 * (2 * fit * D + head.size)
    name = f"plain, {fit} rows"
    yield Case(f"loss, {name}", plain_loss, few, 2 * product, moved)
    yield Case(f"log-probabilities, {name}", plain_log_probs, few, product, moved - 2.0 * fit * D)
    yield Case(f"log-probabilities, both ways, {name}", both_ways(plain_log_probs), few, 2 * product, moved)


def pair(name: str, plain: Callable, shipped: Callable, arguments: tuple) -> Iterator[Case]:
    """Both versions of what reads its arguments once and writes its results once."""
    moved = size((arguments, jax.eval_shape(plain, *arguments)))
    for label, call in (("plain", plain), ("shipped", shipped)):
        yield Case(f"{name}: {label}", call, arguments, 0, moved)


def matrix_pair(
    name: str, group: str, extra: jax.Array, scale: jax.Array | None = None, **options: bool
) -> Iterator[Case]:
    """`nf4_matrix` of the weights of a group of layers; options: below, transposed."""
    width, outs = GROUPS[group]
    below, transposed = (options.get(option, False) for option in ("below", "transposed"))

    def plain(extra, weights, scale):
        return nf4_matrix.reference(weights, extra, scale, below, transposed)

    def shipped(extra, weights, scale):
        return nf4_matrix.nf4_matrix(weights, extra, scale=scale, **options)

    weights = frozen(width, outs)
    moved = size((weights, extra, jax.eval_shape(plain, extra, weights, scale)))
    sets = [(frozen(width, outs, copy), scale) for copy in range(1 + int(ROTATING / moved))]
    for label, call in (("plain", plain), ("shipped", shipped)):
        yield chained(call, sets, extra, 0, moved, f"matrix {group} {name}: {label}")


def matrix_cases(_: int) -> Iterator[Case]:
    """Those of the forward and of the backward pass."""
    for group, (width, outs) in GROUPS.items():
        weights, adapters = layers(width, outs)
        a, b = linear.joined_a(adapters), linear.joined_b(weights, adapters).T
        yield from matrix_pair("[W | B'], bf16", group, linear.with_tail(b))
        if not linear.reads_once(weights, adapters):
            yield from matrix_pair("[W; A'], bf16", group, linear.with_tail(a).T, below=True)
        if group in ("gate_up", "down"):
            scale = fp8.scale_of(weights)
            forward, backward = (
                fp8.parts8(extra, tuple(right for _, right in terms))[0]
                for extra, terms in ((b, fp8.FORWARD), (a, fp8.BACKWARD))
            )
            yield from matrix_pair("[W | B'], e4m3", group, forward, scale)
            yield from matrix_pair("[W' | A], e4m3", group, backward, scale, transposed=True)


def swiglu_cases(rows: int) -> Iterator[Case]:
    """Without `in_place`: outside of a step its input is still needed, and XLA would copy it first."""
    d_act, gate_up = random(1, rows, F), random(2, rows, 2 * F)
    skinny = random(3, rows, 2 * RANK), random(4, rows, RANK)
    scale = jnp.ones(rows, jnp.float32)
    for name, scales in (("bf16", None), ("e5m2", (scale, scale))):
        arguments = (d_act, gate_up, *skinny, scales)
        yield from pair(f"swiglu backward, {name}", swiglu.reference, swiglu.swiglu_backward, arguments)
    yield from pair("swiglu, e4m3", swiglu8.reference, swiglu8.swiglu8, (gate_up, scale))


def chained(product: Callable, sets: list, x: jax.Array, flops: float, moved: float, name: str) -> Case:
    """`product` of x with one set of weights after the other, each waiting for the last."""

    def call(x, sets):
        def body(_, x):
            for given in sets:
                y = jax.lax.optimization_barrier(product(x, *given))
                corner, start = (slice(1),) * x.ndim, (0,) * x.ndim
                nothing = (1e-30 * y[corner].astype(jnp.float32)).astype(x.dtype)
                x = jax.lax.dynamic_update_slice(x, x[corner] + nothing, start)
            return x

        return jax.lax.fori_loop(0, ROUNDS, body, x)

    return Case(name, call, (x, sets), flops, moved, ROUNDS * len(sets))


def decode_cases(rows: int) -> Iterator[Case]:
    for name, (width, outs) in {"one": (D, (F,)), **GROUPS}.items():
        x, total = random(1, rows, width), sum(outs)
        adapters = tuple(
            Adapter(random(i + 10, width, RANK), random(i + 20, RANK, out)) for i, out in enumerate(outs)
        )
        copies = 1 + int(ROTATING / (total * width / 2))
        sets = [(tuple(map(single_quantised, frozen(width, outs, c))), adapters) for c in range(copies)]
        stored = sum(weight.codes.nbytes + weight.absmax.nbytes for weight in sets[0][0])
        flops, small = 2.0 * rows * total * width, 2 * (x.size + rows * total)
        yield chained(reference, sets, x, flops, small + stored, f"decode {name}: dequantise, product")
        folded = fold(*sets[0])  # once, as in generation
        folded_sets = [(*given, folded) for given in sets]
        yield chained(adapted_linear, folded_sets, x, flops, small + stored, f"decode {name}: from the codes")
        bare = [(weights, (None,) * len(outs)) for weights, _ in sets]
        yield chained(adapted_linear, bare, x, flops, small + stored, f"decode {name}: from the codes, bare")
        copies = 1 + int(ROTATING / (total * width * 2))
        sets = [(random(c, total, width),) for c in range(copies)]
        dense_bytes = small + 2.0 * total * width
        yield chained(lambda x, w: x @ w.T, sets, x, flops, dense_bytes, f"decode {name}: dense product")


def decode_attention_cases(rows: int) -> Iterator[Case]:
    q = random(1, rows, KV, HEADS // KV, H)
    stored = 2.0 * 2 * rows * KV * COLUMNS * H
    bounds = jnp.zeros(rows, jnp.int32), jnp.full(rows, COLUMNS, jnp.int32)
    sets = [(*(random(2 * c + i, rows, KV, COLUMNS, H) for i in range(2)), *bounds)
            for c in range(1 + int(ROTATING / stored))]  # fmt: skip
    versions = {"plain": decode_attention.reference, "shipped": decode_attention.decode_attention}
    for label, attend in versions.items():
        product = lambda q, *given, attend=attend: attend(q, *given).out  # noqa: E731
        name = f"decode attention, {COLUMNS} columns: {label}"
        yield chained(product, sets, q, 4.0 * q.size * COLUMNS, stored, name)


CASES = {
    "linear": linear_cases,
    "mlp": mlp_cases,
    "matrix": matrix_cases,
    "swiglu": swiglu_cases,
    "attention": attention_cases,
    "loss": loss_cases,
    "decode": decode_cases,
    "decode_attention": decode_attention_cases,
}
COLUMNS = 1024  # of the cache of a sequence, all seen
ROTATING = 180e6  # of what rotates: three times the cache
ROUNDS = 20


def parts(case: Case) -> list[tuple[str, float, float]]:
    """Kernels of one call by what they took: name, launches and microseconds, divided by the repeats; then the gaps.

    Instructions that differ in their number only count as one.
    """
    call = jax.jit(case.call)
    jax.block_until_ready(call(*case.arguments))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call(*case.arguments))
        trace = jax.profiler.ProfileData.from_file(str(next(Path(folder).rglob("*.xplane.pb"))))
    events = sorted((start, end, name) for _, name, start, end in overlap.device_events(trace))
    took: collections.Counter[str] = collections.Counter()
    launches: collections.Counter[str] = collections.Counter()
    for start, end, name in events:
        kind = re.sub(r"[._]\d+$", "", name)
        took[kind] += (end - start) / 1e3 / case.repeats
        launches[kind] += 1
    found = [(kind, launches[kind] / case.repeats, us) for kind, us in took.most_common()]
    whole = (max(end for _, end, _ in events) - events[0][0]) / 1e3 / case.repeats
    return [*found, ("gaps", 0, whole - sum(took.values()))]


def timed(case: Case) -> tuple[float, float, float]:
    """Median, shortest and longest of 7 times of a call, microseconds: each the mean of 20 calls queued together."""
    times = [seconds / case.repeats * 1e6 for seconds in measuring.call_seconds(case.call, *case.arguments)]
    return statistics.median(times), min(times), max(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[8192], help="tokens")
    parser.add_argument("--decode_rows", nargs="+", type=int, default=[8], help="sequences")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", default=".", help="folder for kernels.json")
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.profile:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
    ceilings = measuring.ceilings_here()
    if ceilings is None:
        parser.error(f"needs a GPU; this machine has {jax.devices()[0].device_kind}")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {ceilings.said()}")
    sizes = {"matrix": [0], "decode": args.decode_rows, "decode_attention": args.decode_rows}
    results = []
    for kind in args.only:
        for rows in sizes.get(kind, args.rows):
            for case in CASES[kind](rows):
                median, low, high = timed(case)
                limit = max(case.moved / ceilings.bandwidth, case.flops / getattr(ceilings, case.rate)) * 1e6
                results.append(
                    {"rows": rows, "name": case.name, "us": median, "low": low, "high": high, "limit": limit}
                )
                print(
                    f"{rows or '':>6} {case.name:56s} {median:10.1f} us ({low:.1f} to {high:.1f})  limit {limit:9.1f}",
                    flush=True,
                )
                if args.profile:
                    *kernels, gaps = parts(case)
                    for name, launches, us in [*kernels[:8], gaps]:
                        print(f"{'':8s} {us:8.2f} us, {launches:6.2f} launches  {name}", flush=True)
    Path(args.out, "kernels.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
