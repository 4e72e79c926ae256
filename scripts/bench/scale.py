"""What a QLoRA step should take on many GPUs: compute, gathers, sums and memory, as a table. No GPU needed.

    python scripts/bench/scale.py                      # the tables of docs/scale.md
    python scripts/bench/scale.py --nvlink 200e9 --infiniband 100e9

Compute: operations of a step at the rates that one H200 reached. Bytes are those of the compiled programs (step.py
--compile_for h200 says them). What splitting costs inside a host is fitted to steps of 2 and 4 H200s (docs/scale.md),
between hosts it is assumed.
"""

import argparse
from typing import NamedTuple

# hidden, ffn, layers, heads, kv heads, head_dim, vocabulary
SHAPES = {
    "8B": (4096, 14336, 32, 32, 8, 128, 128256),
    "70B": (8192, 28672, 80, 64, 8, 128, 128256),
    "405B": (16384, 53248, 126, 128, 8, 128, 128256),
}
RATES = {
    "8B": 523e12,
    "70B": 551e12,
    "405B": 637e12,
}  # operations/s of one H200's step; 405B's: 70B, all recomputed
CODE_BYTES = 1 / 2 + 1 / 64  # of a weight in NF4: its code and its block's 8-bit scale
HOST = 8  # GPUs of a host
SPLIT = 0.027  # seconds that a split base costs a step whatever its size: copies of codes, stacks filled with zeros
NOT_HIDDEN = (
    0.5  # of a gather inside a host, of its time at NVLink's rate: what it takes from kernels beside it
)


class Machine(NamedTuple):
    """Bytes a second that a GPU gets inside a host, and through its host's network cards from others; bytes."""

    nvlink: float = 450e9
    infiniband: float = 400e9  # 8 cards of 400 Gbit/s
    memory: float = 141e9


class Model(NamedTuple):
    """Of one shape with rank 16 on all seven projections."""

    layers: int
    hidden: int
    linear: int  # weights of the layers
    head: int  # weights of the head; the embedding has as many
    adapter: int
    attention_width: int
    gate_up: int
    everything: int  # elements a token and layer that remat="none" keeps


def model(name: str, rank: int = 16) -> Model:
    hidden, ffn, layers, heads, kv, h, vocab = SHAPES[name]
    matrices = [(hidden, heads * h), (hidden, kv * h), (hidden, kv * h), (heads * h, hidden)]
    matrices += [(hidden, ffn), (hidden, ffn), (ffn, hidden)]
    linear = layers * sum(a * b for a, b in matrices)
    adapter = layers * rank * sum(a + b for a, b in matrices)
    everything = 2 * hidden + (2 * heads + 2 * kv) * h + 2 * ffn
    return Model(layers, hidden, linear, vocab * hidden, adapter, heads * h, 2 * ffn, everything)


class Policy(NamedTuple):
    """remat: what a GPU keeps of a layer, a field of `Model`, and how often each frozen weight is multiplied with."""

    kept: str
    passes: int


POLICIES = {
    "none": Policy("everything", 2),
    "none+offload": Policy("gate_up", 2),
    "all": Policy("hidden", 3),
}
# rows, tokens, the fastest policy that fits
STEPS = {"8B": (4, 2048, "none"), "70B": (1, 8192, "none+offload"), "405B": (1, 8192, "all")}


class Step(NamedTuple):
    """Of one GPU: seconds, bytes received, bytes held."""

    compute: float
    gather: float
    reduce: float
    total: float
    gathered: float
    summed: float
    memory: float


def step(name: str, machine: Machine, data: int, fsdp: int) -> Step:
    """A step of `STEPS` on data x fsdp GPUs."""
    m, rate, (rows, tokens, remat) = model(name), RATES[name], STEPS[name]
    count, gpus, passes = rows * tokens, data * fsdp, POLICIES[remat].passes
    operations = 2.0 * count * (passes * m.linear + 2 * m.head)
    operations += (passes + 1.5) * 2 * rows * m.layers * tokens**2 * m.attention_width
    compute = operations / rate
    codes, share = CODE_BYTES * m.linear, (fsdp - 1) / fsdp
    gathered = share * (
        2 * codes + 2 * m.head + 2 * count * m.hidden
    )  # forwards and backwards; head; embedded tokens
    inside = NOT_HIDDEN / machine.nvlink
    gather = 0.0 if fsdp == 1 else SPLIT + gathered * (inside if fsdp <= HOST else 1 / machine.infiniband)
    summed = 2 * (gpus - 1) / gpus * 4 * m.adapter
    reduce = summed / (machine.nvlink if gpus <= HOST else machine.infiniband)
    kept = 2 * count * m.layers * getattr(m, POLICIES[remat].kept)
    working = 2 * count * (12 * m.hidden)  # of one layer, about
    held = (codes + 4 * m.head) / fsdp + (2 * codes / m.layers + 2 * m.head) * (fsdp > 1)
    memory = held + 4 * m.adapter * (1 + 1 + 0.5) + kept + working
    total = compute + gather + reduce
    return Step(compute, gather, reduce, total, gathered, summed, memory)


def fits(m: Model, machine: Machine, fsdp: int) -> bool:
    """As devices.make_layout decides."""
    return CODE_BYTES * m.linear + 4 * m.head <= 0.6 * machine.memory * fsdp


def lines(name: str, gpus: int, machine: Machine) -> list[str]:
    """The base whole on each GPU, split over a host's, and split over all."""
    (rows, tokens, _), found = STEPS[name], []
    alone = step(name, machine, 1, 1).compute
    for fsdp in sorted({1, min(gpus, HOST), gpus}):
        s = step(name, machine, gpus // fsdp, fsdp)
        if fits(model(name), machine, fsdp) and s.memory < machine.memory:
            rate = gpus * rows * tokens / s.total
            found.append(
                f"| {name} | {gpus} | {gpus // fsdp} × {fsdp} | {s.gathered / 1e9:.1f} ({s.gather * 1e3:,.0f}) | "
                f"{s.summed / 1e9:.2f} ({s.reduce * 1e3:.1f}) | {s.total * 1e3:,.0f} | {rate:,.0f} | "
                f"{alone / s.total:.1%} | {s.memory / 1e9:.0f} |"
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in Machine()._asdict().items():
        parser.add_argument(f"--{name}", type=float, default=value)
    machine = Machine(**vars(parser.parse_args()))
    for name, (rows, tokens, remat) in STEPS.items():
        compute = step(name, machine, 1, 1).compute
        print(f"\n{name}, {rows}×{tokens} tokens a GPU, `{remat}`: {compute * 1e3:,.0f} ms of compute\n")
        print(
            "| model | GPUs | data × fsdp | gathered, GB (ms) | summed, GB (ms) | step, ms | tokens/s | of ideal | GB |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for gpus in (1, 2, 4, 8, 32, 128, 512):
            print("\n".join(lines(name, gpus, machine)) or f"| {name} | {gpus} | does not fit |")


if __name__ == "__main__":
    main()
