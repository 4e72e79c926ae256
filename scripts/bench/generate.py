"""Rollouts on random weights of a real shape: tokens a second, a decode step, and memory, beside their floors.

    python scripts/bench/generate.py --sequences 8 64 256 512 --weights merged      # Llama-3.1-8B, 512 + 1,024 tokens
    python scripts/bench/generate.py --sequences 1 8 --group 1 --weights auto lora  # batch inference
    python scripts/bench/generate.py --sequences 8 64 --plain decode_attention      # attention by XLA alone (plain.py)
    python scripts/bench/generate.py --sequences 256 --profile                      # where a decode step's time goes
    python scripts/bench/generate.py --compile_for h200                             # no GPU needed, only jax[cuda13]

One `Engine.generate` of all sequences in groups that share a prompt, sampled at temperature 1 with log-probs, nothing
stops early. tokens/s is new tokens over the whole call, prefill included. A decode step is timed apart at four lengths
of the answers (`--steps` steps each, the programs compiled before); the floor of one is the larger of its products'
operations and the weights' bytes, and the bytes of caches that are filled, at the ceilings of the same machine.
Predicted memory is weights and the engine's forecast; the peak is the process's so far: give sequences in rising order.
Predicted for an H200: 60 s a line at 512 sequences, half of it below, a third of that compiling.

--profile adds what the kernels of a step took, at the longest answers and without CUDA graphs, which hide the names.
"""

import argparse
import dataclasses
import json
import os
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cards
import measuring
import plain
import roofline
import step

from jaxtune import gpu_memory


@dataclasses.dataclass
class Result:
    """One number of sequences with one form of the weights. step_ms, floor_ms: by tokens of the answers so far."""

    sequences: int
    weights: str
    tokens_per_second: float
    seconds: tuple[float, ...]
    prefill_s: float
    step_ms: dict[int, float]
    floor_ms: dict[int, float]
    predicted_gb: float
    peak_gb: float
    compile_s: float
    waves: int
    plain: str
    took_ms: dict[str, float] | None = None
    kernels: list[dict[str, Any]] | None = None

    def line(self) -> str:
        steps = "  ".join(f"{n}: {ms:.2f} ({self.floor_ms[n]:.2f})" for n, ms in self.step_ms.items())
        steps += f"  plain {self.plain}" if self.plain else ""
        memory = f"{self.predicted_gb:9.2f} {self.peak_gb:7.2f}"
        return (
            f"{self.sequences:5d} {self.weights:7s} {self.tokens_per_second:9.0f} {min(self.seconds):8.2f} "
            f"{self.prefill_s:8.2f} {memory} {self.compile_s:8.1f} {self.waves:5d}   {steps}"
        )


HEADER = "  seq weights  tokens/s  seconds  prefill predicted    peak  compile waves   ms a step (floor) at n tokens"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=step.MODELS, default="llama-3.1-8b")
    parser.add_argument("--sequences", nargs="+", type=int, default=[8, 64, 256, 512])
    parser.add_argument("--group", type=int, default=8, help="sequences that share a prompt")
    parser.add_argument("--weights", nargs="+", choices=("auto", "merged", "lora"), default=["merged"])
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--new", type=int, default=1024, help="tokens")
    parser.add_argument("--top_k", type=int, default=0)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--steps", type=int, default=48, help="decode steps timed at each width")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--plain", choices=("decode_attention",), default="", help="left to XLA in this run")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument(
        "--compile_for", choices=list(cards.CARDS), help="compile, on a machine without a GPU"
    )
    parser.add_argument("--out", default=".", help="folder for generate.json and the programs' HLO")
    return parser.parse_args()


def make_bench(args: argparse.Namespace) -> step.Bench:
    return step.Bench(argparse.Namespace(**vars(args), compute_dtype="bf16", optim="adamw_8bit"))


def make_model(args: argparse.Namespace):
    """The `Model` that a user has, on `step.Bench`'s random leaves."""
    from jaxtune import lora
    from jaxtune.model import Model

    bench = make_bench(args)
    bench.fill()
    checkpoint: Any = SimpleNamespace(config=bench.config, name_or_path=args.model, generation_config={})
    model = Model(bench.module, bench.trainable, bench.base, checkpoint=checkpoint, tokenizer=None,
                  max_seq_length=args.prompt + args.new, recipe=None)  # fmt: skip
    model.lora = lora.LoraConfig(r=args.rank)
    return model


def floor_ms(model, weights, rows: int, groups: int, prompt: int, own: int, ceilings) -> float:
    """Of a decode step: weights and products, and caches of which `own` columns a row are filled."""
    from jaxtune.generate import plan
    from jaxtune.generate.weights import merged_bytes, step_bytes

    c, token = model.module.config, plan.token_bytes(model.module.config, model.dtype)
    parameters = merged_bytes(model) // model.dtype.dtype.itemsize + c.vocab_size * c.hidden_size
    products = max(step_bytes(weights) / ceilings.bandwidth, 2 * parameters * rows / ceilings.bf16)
    return (products + (groups * prompt + rows * own) * token / ceilings.bandwidth) * 1e3


def fills(new: int, segment: int) -> list[int]:
    """Numbers of an answer's tokens at which a decode step is timed: quarters, at the end of a segment."""
    return sorted({max(1, new * i // (4 * segment)) * segment for i in range(1, 5)})


def time_steps(
    engine, request: dict[str, Any], args: argparse.Namespace
) -> tuple[Any, float, dict[int, float]]:
    """Runs a call's programs once and times its decode steps: (the wave, prefill s, ms a step by tokens so far)."""
    import jax
    import jax.numpy as jnp

    from jaxtune.generate.wave import Wave

    weights, job, waves = engine._seated(engine._job(**request), args.group, None)
    for _ in range(2):  # the first compiles
        wave = Wave(weights, job, waves[0], set())
        began = time.perf_counter()
        jax.block_until_ready(wave._begin().report)
        prefill, took = time.perf_counter() - began, {}
    for filled in fills(args.new, job.segment):
        times = []
        for _ in range(1 + max(1, args.steps // job.segment)):
            wave._steps = filled - job.segment
            wave._make_room(filled)
            wave._state = wave._state._replace(step=jnp.int32(wave._steps))
            jax.block_until_ready(wave._state)
            began = time.perf_counter()
            jax.block_until_ready(wave._segment().report)
            times.append((time.perf_counter() - began) / job.segment * 1e3)
        took[filled] = statistics.median(times[1:])
    return wave, prefill * len(waves), took


def measure(
    model, kind: Any, sequences: int, args: argparse.Namespace, ceilings: roofline.Ceilings
) -> Result:
    import jax
    import numpy as np

    from jaxtune.generate import Engine, Sampling, plan
    from jaxtune.generate.weights import merged_bytes

    compiled = [0.0]
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: (
            compiled.append(seconds) if name.endswith("backend_compile_duration") else None
        )
    )
    prompts = np.random.default_rng(0).integers(4, 1000, (-(-sequences // args.group), args.prompt)).tolist()
    sampling = Sampling(do_sample=True, top_k=args.top_k, top_p=args.top_p)
    with Engine(model, weights=kind, progress=False) as engine:
        request = {"prompts": prompts, "n": args.group, "sampling": sampling, "seed": 0}
        unused = {"on_tokens": None, "streams": None, "images": None}
        asked = request | {"limit": args.new, "stop": [], "strings": ()} | unused
        wave, prefill, took = time_steps(engine, asked, args)
        profiled = profile(wave, args, ceilings) if args.profile else (None, None)
        places, size = wave._seats.rows.shape
        weights, waves = wave._weights, -(-len(prompts) * args.group // int((wave._seats.rows >= 0).sum()))
        del wave
        seconds = []
        for _ in range(args.runs):
            began = time.perf_counter()
            found = engine.generate(**request, max_new_tokens=args.new, stop_token_ids=[])
            seconds.append(time.perf_counter() - began)
        columns = plan.bucket(args.prompt, plan.PROMPT_COLUMNS)
        need = engine.forecast(places, size, columns, plan.bucket(args.new, plan.OWN_COLUMNS)).total
        copy = merged_bytes(model) if engine.weights == "merged" else 0
        floors = {
            width: floor_ms(model, weights, places * size, places, args.prompt, width, ceilings)
            for width in took
        }
        return Result(
            sequences, engine.weights, found.num_tokens / min(seconds), tuple(seconds), prefill, took, floors,
            (model.memory_bytes() + copy + need) / 1e9, measuring.peak_gb(), sum(compiled), waves, args.plain,
            *profiled,
        )  # fmt: skip


def profile(wave, args: argparse.Namespace, ceilings) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """What one segment's kernels took, a step."""
    import jax

    from jaxtune.generate import steps

    job = wave._job
    lowered = steps.decode.of(wave._weights).lower(
        wave._weights, wave._prompts, wave._state, wave._streams(), job.seed, spec=job.spec, steps=job.segment
    )

    def segment():
        wave._steps -= job.segment
        wave._state = wave._state._replace(step=jax.numpy.int32(wave._steps))
        jax.block_until_ready(wave._segment().report)

    kinds, rows = measuring.profile(segment, lowered.compile().as_text(), ceilings, job.segment)
    rows = [row | {key: row[key] / job.segment for key in ("ms", "floor", "launches")} for row in rows]
    return {kind: round(value / job.segment, 3) for kind, value in kinds.items()}, rows


def show(result: Result) -> None:
    print(result.line(), flush=True)
    if result.took_ms is None or result.kernels is None:
        return
    launches = sum(row["launches"] for row in result.kernels)
    print(f"      a step: {launches:.0f} launches, ms by kind", result.took_ms)
    for row in result.kernels[:40]:
        print(
            f"      {row['ms'] * 1e3:8.1f} us a step, floor {row['floor'] * 1e3:7.1f}, {row['launches']:5.1f} times "
            f"{row['ms'] * 1e3 / row['launches']:6.1f} us  {row['kernel'][:44]:44s} {row['op'][-60:]}"
        )


def compiled_step(
    bench: step.Bench, kind: str, rows: int, args: argparse.Namespace, place, capability
) -> Any:
    """A decode step with full caches, compiled for a device that need not be there."""
    import jax
    import jax.numpy as jnp

    from jaxtune.generate import Sampling, plan, steps
    from jaxtune.generate.weights import merged, reads_codes, stored
    from jaxtune.kernels import target

    c, dtype = bench.module.config, jnp.dtype(bench.module.dtype)
    groups = -(-rows // args.group)

    def leaf(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def caches(batch, columns):
        one = leaf(batch, c.num_kv_heads, columns, c.head_dim, dtype=dtype)
        return ((one, one),) * len(c.windows)

    def make(base, trainable):
        model = SimpleNamespace(module=bench.module, base=base, trainable=trainable, dtype=bench.module.dtype)
        return merged(model) if kind == "merged" else stored(model, read_codes=reads_codes(model, rows))

    spec = steps.Spec(c, dtype, Sampling(do_sample=True, top_k=args.top_k, top_p=args.top_p))
    with target.tracing_for(capability), plain.plain(args.plain):
        weights = jax.eval_shape(make, bench.base, bench.trainable)
        weights = jax.tree.map(lambda x: leaf(*x.shape, dtype=x.dtype), weights)
        state = steps.State(caches(rows, plan.bucket(args.new, plan.OWN_COLUMNS)), leaf(rows), leaf(), None)
        prompts = steps.Prompts(
            caches(groups, plan.bucket(args.prompt, plan.PROMPT_COLUMNS)), *[leaf(groups)] * 3
        )
        streams, seed = leaf(groups, args.group, 2), leaf(dtype=jnp.uint32)
        traced = steps.decode.of(weights).trace(weights, prompts, state, streams, seed, spec=spec, steps=16)
        return traced.lower(lowering_platforms=("cuda",)).compile()


def without_a_gpu(args: argparse.Namespace) -> None:
    """What the compiler says of the decode steps that a card would run."""
    card = cards.CARDS[args.compile_for]
    (device,) = cards.compile_only(card)
    import jax

    print(f"compiled for {card.name}: memory is that card's, times below are an H200's", flush=True)
    place, bench = jax.sharding.SingleDeviceSharding(device), make_bench(args)
    for kind in args.weights:
        for rows in args.sequences:
            began = time.perf_counter()
            compiled = compiled_step(bench, kind, rows, args, place, card.capability)
            text, took = compiled.as_text(), time.perf_counter() - began
            name = f"decode_{rows}_{kind}" + (f"_plain_{args.plain}" if args.plain else "")
            (Path(args.out) / f"{name}.hlo.txt").write_text(text)
            kernels = roofline.kernels(text, roofline.H200)
            kinds = {name: round(value / 16 * 1e3, 3) for name, value in roofline.by_kind(kernels).items()}
            print(
                f"{rows:5d} {kind:7s} a step: {sum(kinds.values()):.2f} ms at best {kinds}, "
                f"{sum(kernel.times for kernel in kernels) / 16:.0f} launches, temporaries "
                f"{compiled.memory_analysis().temp_size_in_bytes / 1e9:.2f} GB, compiled in {took:.0f} s",
                flush=True,
            )


def main() -> None:
    args = arguments()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.compile_for:
        without_a_gpu(args)
        return
    gpu_memory.claim()
    if args.profile:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
    here = measuring.ceilings_here()
    import jax

    ceilings = here._replace(bandwidth=here.read) if here else roofline.H200
    where = f"reads at {here.read / 1e12:.2f} TB/s" if here else "floors below are an H200's"
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {where}\n{HEADER}", flush=True)
    model, results = make_model(args), []
    for kind in args.weights:
        for sequences in args.sequences:
            with plain.plain(args.plain):
                results.append(measure(model, kind, sequences, args, ceilings))
            show(results[-1])
            (Path(args.out) / "generate.json").write_text(
                json.dumps([dataclasses.asdict(result) for result in results], indent=1)
            )


if __name__ == "__main__":
    main()
