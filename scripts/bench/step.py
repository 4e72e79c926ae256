"""A QLoRA training step on random weights of a real shape: tokens a second, memory, and where the time goes.

    python scripts/bench/step.py --batch 4x2048 1x8192 --remat auto all+offload
    python scripts/bench/step.py --batch 4x2048 --remat none --profile
    python scripts/bench/step.py --batch 4x2048 --remat none --devices 4 --layout data fsdp
    python scripts/bench/step.py --model 70b --batch 1x8192 --remat auto --devices 2 --layout fsdp
    python scripts/bench/step.py --batch 4x2048 --remat none --plain linear mlp linear+mlp
    python scripts/bench/step.py --compile_for h200        # no GPU needed, only jax[cuda13]: memory and the floor
    python scripts/bench/step.py --compile_for rtx4090 --batch 2x2048 1x4096 --remat none attention+residual+offload

On a GPU, first the ceilings of that very machine (copy, products), then for each batch and each choice of `remat`:
median and spread of the step, tokens/s, memory forecast and peak, what the GPU drew (power.py), and the floor: what
each kind of kernel must cost at those ceilings (roofline.py). --profile adds what each kind took and the kernels
furthest above their floor; the step then runs without CUDA graphs, which hide the names (about 1 % slower). A batch
that does not fit is tried again with half the rows, then half the tokens; its line says so. step.json has what was
measured so far.
Peaks are the process's so far (`before`: before that program ran, when weights were made and programs compiled): give
batches and choices in the order of their size. On several GPUs the batch is that of each; `data` is a copy of the base
on each, `fsdp` one over all, 2x4 two copies, each over four. What collectives leave on a GPU in a step is said by kind
and dtype. --plain runs each step again with parts left to XLA (plain.py).
"""

import argparse
import dataclasses
import itertools
import json
import os
import re
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cards
import measuring
import plain
import power
import roofline

from jaxtune import gpu_memory

# hidden, ffn, layers, heads, kv heads, head_dim, vocabulary, tied
MODELS = {
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128, 128256, False),
    "70b": (8192, 28672, 80, 64, 8, 128, 128256, False),
    "405b": (16384, 53248, 126, 128, 8, 128, 128256, False),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 64, 128256, True),
    "smollm2-135m": (576, 1536, 30, 9, 3, 64, 49152, True),
    "tiny": (256, 512, 2, 4, 2, 64, 1024, False),  # for trying the scripts on a CPU
}


@dataclasses.dataclass
class Result:
    """One batch shape with one choice of remat; times in milliseconds, memory in GB."""

    batch: str
    remat: str
    layout: str
    devices: int
    compile_s: float
    needs_gb: float
    host_gb: float
    floor_ms: dict[str, float]
    median_ms: float | None = None
    spread_ms: tuple[float, float] | None = None
    tokens_per_second: float | None = None
    before_gb: float | None = None  # the process's peak before the first step: weights, compilation
    peak_gb: float | None = None
    loss: float | None = None
    traffic_mb: dict[str, float] | None = None
    took_ms: dict[str, float] | None = None
    kernels: list[dict[str, Any]] | None = None
    drew: power.Draw | None = None  # while the timed steps ran
    scaled_from: str | None = None  # the batch asked for, where it did not fit
    plain: str = ""  # what was left to XLA

    def line(self) -> str:
        floor = sum(self.floor_ms.values())
        what = f"{self.batch:>9s} {self.layout:5s} {self.remat:22s}"
        scaled = f"  plain {self.plain}" if self.plain else ""
        scaled += f"  scaled to memory from {self.scaled_from}" if self.scaled_from else ""
        text = f"{what} needs {self.needs_gb:7.2f} GB  floor {floor:8.1f} ms"
        if self.median_ms is None or self.spread_ms is None:
            return text + scaled
        low, high = self.spread_ms
        each = f" ({(self.tokens_per_second or 0) / self.devices:.0f} a GPU)" if self.devices > 1 else ""
        drew = f"  {self.drew.said()}" if self.drew else ""
        return (
            f"{text}  took {self.median_ms:8.1f} ms ({low:.1f} to {high:.1f})  {self.tokens_per_second:8.0f} tokens/s"
            f"{each}  peak {self.peak_gb:6.2f} GB ({self.before_gb:.2f} before){drew}{scaled}"
        )


def positive(word: str) -> int:
    """For argparse."""
    if int(word) < 1:
        raise ValueError(word)
    return int(word)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Of the command line, checked.

    words: instead of it.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument("--batch", nargs="+", default=["4x2048"], help="rows x tokens")
    parser.add_argument("--remat", nargs="+", default=["none", "all"], help="see SFTConfig.remat; auto too")
    parser.add_argument("--documents", type=positive, default=1, help="documents packed into a row")
    parser.add_argument(
        "--compute_dtype", choices=("bf16", "fp8"), default="bf16", help="of the frozen products"
    )
    parser.add_argument("--optim", default="adamw_8bit")
    parser.add_argument("--rank", type=positive, default=16)
    parser.add_argument("--steps", type=positive, default=10)
    parser.add_argument(
        "--plain", nargs="+", default=[], help="linear, mlp, linear+mlp: beside the shipped step"
    )
    parser.add_argument("--profile", action="store_true")
    parser.add_argument(
        "--compile_for", choices=list(cards.CARDS), help="compile, on a machine without a GPU"
    )
    parser.add_argument("--devices", type=positive, default=1)
    parser.add_argument("--layout", nargs="+", default=["data"], help="data, fsdp, or data x fsdp as 2x4")
    parser.add_argument("--out", default=".", help="folder for step.json and the programs' HLO")
    args = parser.parse_args(words)
    try:
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for what argparse does not see."""
    from jaxtune.config import remat_parts

    for name in args.batch:
        _, tokens = batch_shape(name)
        if tokens < args.documents:
            raise ValueError(f"--documents {args.documents} do not fit into the rows of --batch {name}")
    for name in args.remat:
        if name != "auto":
            remat_parts(name)
        elif args.compile_for:
            raise ValueError(
                "--remat auto asks a device what fits, and --compile_for has none; name policies: none, all, "
                "attention+offload, ..."
            )
    for name in args.layout:
        mesh_shape(name, args.devices)
    if args.plain and "auto" in args.remat:  # which remembers what a step of these shapes needs, as shipped
        raise ValueError("--plain compares steps of one policy; name it in place of --remat auto")
    for name in args.plain:
        plain.check(name, ("linear", "mlp"))
        if "linear" in name and args.compute_dtype == "fp8":
            raise ValueError(f"--plain {name}: linear layers in fp8 have no plain version; --plain mlp has")
    if args.compile_for and args.profile:
        raise ValueError("--profile runs the step, which --compile_for only compiles; leave one out")


def batch_shape(name: str) -> tuple[int, int]:
    """(rows, tokens) that a word of --batch means."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
    if not found:
        raise ValueError(f"--batch {name}: expected ROWSxTOKENS, as 4x2048")
    return int(found[1]), int(found[2])


def smaller(rows: int, tokens: int, least: int = 256) -> tuple[int, int] | None:
    """The next batch to try where this one does not fit: half the rows, then half the tokens, at least so many."""
    if rows > 1:
        return rows // 2, tokens
    return (rows, tokens // 2) if tokens // 2 >= least else None


def mesh_shape(layout: str, devices: int) -> tuple[int, int]:
    """(data, fsdp) that a word of --layout means."""
    words = {"data": (devices, 1), "fsdp": (1, devices)}
    if layout not in words and not re.fullmatch(r"\d+x\d+", layout):
        raise ValueError(f"--layout {layout}: expected data, fsdp, or data x fsdp as 2x4")
    data, fsdp = words[layout] if layout in words else map(int, layout.split("x"))
    if data * fsdp != devices:
        raise ValueError(f"--layout {layout} is not --devices {devices}")
    return data, fsdp


class Bench:
    """Model, optimizer and the leaves (shapes, or random arrays on the devices)."""

    def __init__(self, args: argparse.Namespace):
        import jax
        import jax.numpy as jnp
        from flax import nnx
        from transformers import LlamaConfig

        from jaxtune import lora, models
        from jaxtune.config import SFTConfig
        from jaxtune.devices import ONE_DEVICE
        from jaxtune.models.names import leaf_shapes, trainable_paths
        from jaxtune.optim import make_optimizer

        hidden, ffn, layers, heads, kv, head_dim, vocab, tied = MODELS[args.model]
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv, head_dim=head_dim, vocab_size=vocab, tie_word_embeddings=tied,
            max_position_embeddings=131072, rope_theta=500000.0,
        )  # fmt: skip
        self.ceilings, self.layout, self.layout_name = roofline.H200, ONE_DEVICE, "data"
        self.plain = ""
        self.args, self.config = args, config
        self.module = models.build(config, jnp.bfloat16, nf4=True, fp8=args.compute_dtype == "fp8")
        lora.attach(self.module, lora.LoraConfig(r=args.rank))
        shapes, trained = leaf_shapes(self.module), trainable_paths(self.module)
        self.trainable: Any = {path: s for path, s in shapes.items() if path in trained}
        self.base: Any = {path: s for path, s in shapes.items() if path not in trained}
        training = SFTConfig(optim=args.optim, learning_rate=2e-4)
        self.optimizer = make_optimizer(training, 1000, self.trainable)
        self.state: Any = jax.eval_shape(self.optimizer.init, self.trainable)
        self.model = SimpleNamespace(
            graphdef=nnx.graphdef(self.module), module=self.module, dtype=self.module.dtype
        )

    def lay_out(self, name: str, devices: list) -> None:
        """Where `fill` and the steps put things."""
        import numpy as np
        from jax.sharding import Mesh

        from jaxtune.devices import AXES, ONE_DEVICE, Layout

        self.layout_name, self.layout = name, ONE_DEVICE
        if len(devices) > 1:
            shape = mesh_shape(name, len(devices))
            self.layout = Layout(Mesh(np.asarray(devices).reshape(shape), AXES))

    def fill(self) -> None:
        """Random leaves on the devices; the adapter's B is not zero, so that every gradient is one."""
        import jax
        import jax.numpy as jnp

        from jaxtune.models.names import leaf_shapes

        def random(key, shape):
            if shape.dtype == jnp.uint8:  # the same in every layer
                return jnp.broadcast_to(jax.random.bits(key, shape.shape[1:], jnp.uint8), shape.shape)
            return jnp.asarray(0.02, shape.dtype) * jax.random.normal(key, shape.shape, shape.dtype)

        shapes = leaf_shapes(self.module)
        specs, sharding = self.layout.specs(self.module, shapes), self.layout.sharding
        paths = list(self.base), list(self.trainable)
        self.base = self.trainable = self.state = None  # those of an earlier layout go first
        leaves = {}
        for i, (path, shape) in enumerate(shapes.items()):
            make = jax.jit(random, static_argnums=1, out_shardings=sharding(specs[path]))
            leaves[path] = make(jax.random.key(i), shape)
        self.base, self.trainable = ({path: leaves[path] for path in part} for part in paths)
        self.state = jax.jit(self.optimizer.init, out_shardings=sharding())(self.trainable)
        jax.block_until_ready((self.base, self.trainable, self.state))

    def batch(self, rows: int, tokens: int) -> dict[str, Any]:
        """Of `rows` on each device; random ids, every token but each document's first a label."""
        import numpy as np

        documents, rows = self.args.documents, rows * self.layout.size
        length = -(-tokens // documents)
        positions = np.broadcast_to(np.arange(tokens) % length, (1, rows, tokens)).astype(np.int32)
        ids = np.random.default_rng(0).integers(4, 32000, positions.shape).astype(np.int32)
        segments = np.broadcast_to(np.arange(tokens) // length + 1, positions.shape).astype(np.int32)
        starts = np.broadcast_to(np.arange(documents) * length, (1, rows, documents)).astype(np.int32)
        columns = {"input_ids": ids, "positions": positions, "segment_ids": segments, "starts": starts}
        return columns | {"labels": np.where(positions == 0, -100, ids)}

    def planned(self, remat: str):
        from jaxtune.budget import PlannedStep
        from jaxtune.step import make_train_step

        make = lambda remat: make_train_step(  # noqa: E731
            self.model, self.optimizer, remat=remat, layout=self.layout
        )
        return PlannedStep(make, self.model, remat, layout=self.layout)


def loss_chunks(name: str) -> int:
    """Of a batch of one device, on the machine that is traced for; the compiler does not know how many have labels."""
    from jaxtune.step import default_chunk

    rows, tokens = batch_shape(name)
    return -(-rows * tokens // default_chunk(rows * tokens))


def measure(bench: Bench, name: str, remat: str, compiled, seconds: float, ceilings) -> Result:
    """What the compiler says of a step: memory, and the time of its kernels at the ceilings."""
    from jaxtune.budget import peak_bytes

    out = Path(bench.args.out)
    text, devices = compiled.as_text(), bench.layout.size
    several = f"_{bench.layout_name}_{devices}" if devices > 1 else ""
    left = f"_plain_{bench.plain}" if bench.plain else ""
    (out / f"step_{name}_{remat}{left}{several}.hlo.txt".replace("+", "_")).write_text(text)
    floor = roofline.by_kind(roofline.kernels(text, ceilings, loss_chunks(name), bench.args.documents))
    traffic = {" ".join(kind): round(count / 1e6, 3) for kind, count in roofline.traffic(text).items()}
    host = compiled.memory_analysis().host_temp_size_in_bytes / 1e9
    milliseconds = {kind: round(value * 1e3, 2) for kind, value in floor.items()}
    needs = peak_bytes(compiled) / 1e9
    result = Result(name, remat, bench.layout_name, devices, round(seconds, 1), needs, host, milliseconds)
    result.traffic_mb, result.plain = traffic or None, bench.plain
    return result


def run(bench: Bench, result: Result, compiled, batch) -> None:
    """Steps to warm up (two, or one where few are timed), then timed ones; fills in the result."""
    import jax

    result.before_gb = measuring.peak_gb()
    key = jax.random.key(0)

    def step():
        bench.trainable, bench.state, metrics = compiled(bench.trainable, bench.state, bench.base, batch, key)
        return float(metrics["loss"])

    for _ in range(max(1, min(2, bench.args.steps // 2))):
        step()
    times = []
    with power.drawn() as draw:
        for _ in range(bench.args.steps):
            began = time.perf_counter()
            result.loss = step()
            times.append((time.perf_counter() - began) * 1e3)
    result.drew = draw[0] if draw else None
    result.median_ms = statistics.median(times)
    result.spread_ms = (min(times), max(times))
    result.tokens_per_second = batch["input_ids"].size / result.median_ms * 1e3
    result.peak_gb = measuring.peak_gb()
    if bench.args.profile:
        result.took_ms, result.kernels = measuring.profile(
            step, compiled.as_text(), bench.ceilings, loss_chunks(result.batch), bench.args.documents
        )


def without_a_gpu(args: argparse.Namespace) -> None:
    """The programs that a card would run, compiled for it on a machine without one."""
    card = cards.CARDS[args.compile_for]
    devices = cards.compile_only(card, args.devices)
    import jax

    from jaxtune.devices import STEP_ROWS, WHOLE
    from jaxtune.kernels import target
    from jaxtune.models.remat import Remat
    from jaxtune.step import make_train_step

    print(f"compiled for {card.name}: memory is that card's, floors below are an H200's", flush=True)
    bench, results = Bench(args), []
    for layout, name in itertools.product(args.layout, args.batch):
        bench.lay_out(layout, devices)

        def placed(tree, spec):
            place = bench.layout.sharding(spec) or jax.sharding.SingleDeviceSharding(devices[0])
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

        specs = bench.layout.specs(bench.module, bench.base)
        base = {path: placed(leaf, specs[path]) for path, leaf in bench.base.items()}
        whole = (placed(leaves, WHOLE) for leaves in (bench.trainable, bench.state, jax.random.key(0)))
        trainable, state, key = whole
        batch = placed(bench.batch(*batch_shape(name)), STEP_ROWS)
        for remat, bench.plain in itertools.product(args.remat, ["", *args.plain]):
            began = time.perf_counter()
            with target.tracing_for(card.capability), plain.plain(bench.plain):
                step: Any = make_train_step(
                    bench.model, bench.optimizer, remat=Remat.parse(remat), layout=bench.layout
                )
                traced = step.trace(trainable, state, base, batch, key)
                compiled = traced.lower(lowering_platforms=("cuda",)).compile()
                seconds = time.perf_counter() - began
                results.append(measure(bench, name, remat, compiled, seconds, roofline.Ceilings()))
            report(results, args.out)


def on_this_device(args: argparse.Namespace) -> None:
    ceilings = measuring.ceilings_here()
    import jax

    device = jax.devices()[0]
    if len(jax.devices()) < args.devices:
        raise SystemExit(
            f"--devices {args.devices}: this machine has {len(jax.devices())} ({device.device_kind})"
        )
    if args.profile and ceilings is None:
        raise SystemExit(f"--profile needs a GPU; this machine has {device.device_kind}")
    said = "floors below are an H200's" if ceilings is None else ceilings.said()
    print(f"{device.device_kind}, jax {jax.__version__}: {said}", flush=True)
    bench, results = Bench(args), []
    bench.ceilings = ceilings or roofline.H200
    for layout in args.layout:
        bench.lay_out(layout, jax.devices()[: args.devices])
        try:
            bench.fill()
        except jax.errors.JaxRuntimeError as error:
            if not is_full(error):
                raise
            raise SystemExit(
                f"the weights of {args.model} do not fit this device ({device.device_kind}); try --model llama-3.2-1b"
            ) from None
        for name, remat, bench.plain in itertools.product(args.batch, args.remat, ["", *args.plain]):
            with plain.plain(bench.plain):
                result = scaled(bench, name, remat)
            if result is not None:
                results.append(result)
                report(results, args.out)


def is_full(error: Exception) -> bool:
    """Whether memory is what was missing."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def scaled(bench: Bench, asked: str, remat: str) -> Result | None:
    """Of the batch asked for, or of the first smaller one that fits; None where none runs."""
    name = asked
    while True:
        found = attempt(bench, name, remat)
        if isinstance(found, Result):
            found.scaled_from = asked if name != asked else None
            return found
        less = smaller(*batch_shape(name), least=max(256, bench.args.documents)) if is_full(found) else None
        then = f"; again with {less[0]}x{less[1]}" if less else ""
        what = "fit" if is_full(found) else "run"
        print(f"{name:>9s} {remat:22s} does not {what}: {str(found).splitlines()[0][:120]}{then}", flush=True)
        if less is None:
            return None
        name = f"{less[0]}x{less[1]}"


def attempt(bench: Bench, name: str, remat: str) -> Result | Exception:
    """Compiled, run and measured; the error where that does not work."""
    import jax

    batch = bench.layout.put_rows(bench.batch(*batch_shape(name)), 1)
    call = (bench.trainable, bench.state, bench.base, batch, jax.random.key(0))
    try:
        began = time.perf_counter()
        compiled = bench.planned(remat).compile(call)
        result = measure(bench, name, remat, compiled, time.perf_counter() - began, bench.ceilings)
        run(bench, result, compiled, batch)
        return result
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        failed = error.with_traceback(None)  # which would hold the leaves
    del batch, call
    bench.fill()  # a failed step has taken the donated leaves with it
    return failed


def report(results: list[Result], out: str) -> None:
    """Shows the last one, and keeps all so far in step.json."""
    place, result = Path(out) / "step.json", results[-1]
    part = place.with_suffix(".part")
    part.write_text(json.dumps([dataclasses.asdict(each) for each in results], indent=1))
    part.replace(place)
    print(result.line(), flush=True)
    if result.traffic_mb:
        print("          collectives, MB ", result.traffic_mb, flush=True)
    if result.took_ms:
        measuring.show_profile(result.took_ms, result.floor_ms, result.kernels or [])


def main() -> None:
    args = arguments()
    if args.profile:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.compile_for:
        without_a_gpu(args)
    else:
        gpu_memory.claim()
        on_this_device(args)


if __name__ == "__main__":
    main()
