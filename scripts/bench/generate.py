"""Generation on random weights of a real shape: tokens a second from the NF4 codes and from a bf16 copy of them.

    python scripts/bench/generate.py [--batch 1 8 64 128] [--weights default bf16] [--profile]

`default` is what `Model.generate` takes for that batch: the codes up to 64 rows on Hopper, above them (or on another
GPU) the copy. `bf16` is the copy at any batch. Both go through `Model.generate`, greedy, with LoRA, whole answers.
A token's time is the answer's less the prompt's (prefill, timed apart) and less what a call does first (setup: on the
codes, their scales decoded). The floor is the bytes of weights and of the cache's filled columns over the copy
bandwidth of the same machine. Medians; about 12 s a line on a GPU, most of it compiling, and 25 GB.

--profile adds what one segment of decode steps took by kernel, a token: in the middle of the answer, without CUDA
graphs (they hide the names), which slows the other columns down too: time without it.
"""

import argparse
import dataclasses
import json
import os
import statistics
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import roofline
import step


@dataclasses.dataclass
class Result:
    """One batch with one form of the weights; times in milliseconds, all but the last two medians of the runs."""

    batch: int
    weights: str
    reads_codes: bool
    setup_ms: float
    prefill_ms: float
    answer_ms: float
    token_ms: float
    tokens_per_second: float
    decode_tokens_per_second: float
    floor_ms: float
    spread_ms: tuple[float, float]
    compile_s: float
    took_ms: dict[str, float] | None = None
    kernels: list[dict[str, Any]] | None = None

    def line(self) -> str:
        stored, (low, high) = "codes" if self.reads_codes else "dense", self.spread_ms
        return (
            f"{self.batch:5d} {self.weights:8s}{stored:6s} {self.token_ms:8.2f} ({low:.2f} to {high:.2f}) "
            f"{self.floor_ms:6.2f} {self.decode_tokens_per_second:9.0f} {self.tokens_per_second:9.0f} "
            f"{self.prefill_ms:9.1f} {self.setup_ms:7.1f} {self.answer_ms:9.1f} {self.compile_s:6.1f}"
        )


HEADER = "batch weights read  ms/token (shortest, longest) floor  decode/s  answer/s   prefill   setup    answer  first"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=step.MODELS, default="llama-3.1-8b")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64, 128], help="prompts")
    forms = ["default", "bf16"]
    parser.add_argument("--weights", nargs="+", choices=forms, default=forms, help="in this order only")
    parser.add_argument("--prompt", type=int, default=128, help="tokens, a multiple of 16")
    parser.add_argument("--new", type=int, default=128, help="tokens")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", default=".", help="folder for generate.json")
    return parser.parse_args()


def make_model(args: argparse.Namespace):
    """The `Model` that a user has, on `step.Bench`'s random leaves."""
    import jax.numpy as jnp

    from jaxtune import lora, models
    from jaxtune.model import Model

    bench = step.Bench(argparse.Namespace(**vars(args), compute_dtype="bf16", optim="adamw_8bit"))
    bench.fill()
    checkpoint: Any = SimpleNamespace(config=bench.config, name_or_path=args.model, generation_config={})
    recipe = partial(models.build, bench.config, jnp.bfloat16)
    model = Model(bench.module, bench.trainable, bench.base, checkpoint=checkpoint, tokenizer=None,
                  max_seq_length=args.prompt + args.new, recipe=recipe)  # fmt: skip
    model.lora = lora.LoraConfig(r=args.rank)
    return model


def floor_ms(model, base, args: argparse.Namespace, batch: int, ceilings: roofline.Ceilings) -> float:
    """Reading the weights of a step and the cache as it is filled on average."""
    c, tied = model.module.config, model.module.lm_head is None
    leaves = model.trainable | base
    weights = sum(leaf.nbytes for path, leaf in leaves.items() if tied or "embed_tokens" not in path)
    column = 2 * len(c.windows) * c.num_kv_heads * c.head_dim * model.dtype.dtype.itemsize
    return (weights + batch * (args.prompt + args.new / 2) * column) / ceilings.bandwidth * 1e3


def milliseconds(work) -> float:
    import jax

    began = time.perf_counter()
    jax.block_until_ready(work())
    return (time.perf_counter() - began) * 1e3


def measure(model, name: str, batch: int, args: argparse.Namespace, ceilings: roofline.Ceilings) -> Result:
    import jax
    import numpy as np

    from jaxtune.generate import Sampling, engine

    def stored():
        """What `generate` would read; nothing is kept that it would not keep."""
        kept = model._dense
        found = model._weights_for(batch)
        model._dense = kept
        return found

    ids = np.random.default_rng(0).integers(4, 32000, (batch, args.prompt)).astype(np.int32)
    mask, key = np.ones_like(ids), jax.random.key(0)
    options = {"sampling": Sampling(), "stop": (), "pad": 0}
    graphdef, base = stored()
    leaves = model.trainable, base

    prefill = lambda: engine._prefill(graphdef, *leaves, ids, mask, key, new=args.new, **options)  # noqa: E731
    answer = lambda: model.generate(ids, mask, max_new_tokens=args.new, eos_token_id=[])  # noqa: E731
    first = milliseconds(answer)  # compiles
    before = [(milliseconds(lambda: stored()[1]), milliseconds(prefill)) for _ in range(4)][1:]
    setup, prompt = map(statistics.median, zip(*before, strict=True))
    times = [milliseconds(answer) for _ in range(args.runs)]
    a_token = [(total - setup - prompt) / max(1, args.new - 1) for total in times]
    whole, one = statistics.median(times), statistics.median(a_token)
    reads_codes = any(path.endswith(".codes") for path in base)
    result = Result(
        batch, name, reads_codes, setup, prompt, whole, one, batch * args.new / whole * 1e3, batch / one * 1e3,
        floor_ms(model, base, args, batch, ceilings), (min(a_token), max(a_token)), (first - whole) / 1e3,
    )  # fmt: skip
    if args.profile and jax.devices()[0].platform == "gpu":
        state, steps = prefill(), min(engine.SEGMENT, args.new - 1)
        arguments = {"steps": engine.SEGMENT, **options}
        compiled = engine._decode.lower(graphdef, *leaves, state, **arguments).compile()

        def segment():
            nonlocal state
            state = jax.block_until_ready(compiled(*leaves, state))

        segment()
        kinds, kernels = step.profile(segment, compiled.as_text(), ceilings, steps)
        result.took_ms = {kind: round(value / steps, 3) for kind, value in kinds.items()}
        result.kernels = [
            row | {key: row[key] / steps for key in ("ms", "floor", "launches")} for row in kernels
        ]
    return result


def show(result: Result) -> None:
    print(result.line(), flush=True)
    if result.took_ms is None or result.kernels is None:
        return
    launches = sum(row["launches"] for row in result.kernels)
    print(f"      a token: {launches:.0f} launches, ms by kind", result.took_ms)
    for row in result.kernels[:40]:
        print(
            f"      {row['ms'] * 1e3:8.1f} us a token, floor {row['floor'] * 1e3:7.1f}, {row['launches']:5.1f} times "
            f"{row['ms'] * 1e3 / row['launches']:6.1f} us  {row['kernel'][:44]:44s} {row['op'][-60:]}"
        )


def main() -> None:
    args = arguments()
    if args.prompt % 16:
        raise ValueError(f"--prompt must be a multiple of 16, got {args.prompt}")
    if args.profile:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
    import jax

    Path(args.out).mkdir(parents=True, exist_ok=True)
    gpu = jax.devices()[0].platform == "gpu"
    ceilings = step.ceilings_here() if gpu else roofline.H200
    where = f"copy {ceilings.bandwidth / 1e12:.2f} TB/s" if gpu else "floors below are an H200's"
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {where}\n{HEADER}", flush=True)
    model, results = make_model(args), []
    for name in args.weights:
        if name == "bf16":
            model.for_inference()._reads_codes = lambda rows: False  # whatever the batch
        for batch in args.batch:
            results.append(measure(model, name, batch, args, ceilings))
            show(results[-1])
            (Path(args.out) / "generate.json").write_text(
                json.dumps([dataclasses.asdict(result) for result in results], indent=1)
            )


if __name__ == "__main__":
    main()
