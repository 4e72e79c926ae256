"""What a QLoRA step should take on many GPUs: compute, gathers, sums and memory, as a table. No GPU needed.

    python scripts/bench/scale.py                      # the tables of docs/scale.md
    python scripts/bench/scale.py --nvlink 200e9 --infiniband 100e9

Compute: operations of a step at the rates that one H200 reached. Bytes are those of the compiled programs (step.py
--compile_for_h200 says them). The rate inside a host is what gathers cost the steps of 2 and 4 H200s (docs/scale.md):
what is waited for, and what they take from the kernels beside them. Between hosts it is assumed.
"""

import argparse
from typing import NamedTuple

# hidden, ffn, layers, heads, kv heads, head_dim, vocabulary
SHAPES = {
    "8B": (4096, 14336, 32, 32, 8, 128, 128256),
    "70B": (8192, 28672, 80, 64, 8, 128, 128256),
    "405B": (16384, 53248, 126, 128, 8, 128, 128256),
}
RATES = {"8B": 516e12, "70B": 637e12, "405B": 637e12}  # operations/s of one H200's step; 405B's is 70B's
CODE_BYTES = 1 / 2 + 1 / 64  # of a weight in NF4: its code and its block's 8-bit scale
HOST = 8  # GPUs of a host


class Machine(NamedTuple):
    """Bytes that a GPU gets in collectives, by second that they cost a step, inside a host and between hosts; bytes."""

    nvlink: float = 135e9
    infiniband: float = 112e9  # 8 cards of 400 Gbit/s a host: assumed to lose as much as NVLink does
    memory: float = 141e9


class Model(NamedTuple):
    """Of one shape with rank 16 on all seven projections."""

    layers: int
    hidden: int
    linear: int  # weights of the layers
    head: int  # weights of the head; the embedding has as many
    adapter: int
    attention_width: int
    everything: int  # elements a token and layer that remat="none" keeps


def model(name: str, rank: int = 16) -> Model:
    hidden, ffn, layers, heads, kv, h, vocab = SHAPES[name]
    matrices = [(hidden, heads * h), (hidden, kv * h), (hidden, kv * h), (heads * h, hidden)]
    matrices += [(hidden, ffn), (hidden, ffn), (ffn, hidden)]
    linear = layers * sum(a * b for a, b in matrices)
    adapter = layers * rank * sum(a + b for a, b in matrices)
    everything = 2 * hidden + (2 * heads + 2 * kv) * h + 2 * ffn
    return Model(layers, hidden, linear, vocab * hidden, adapter, heads * h, everything)


class Step(NamedTuple):
    """Of one GPU: seconds, bytes received, bytes held."""

    compute: float
    gather: float
    reduce: float
    total: float
    gathered: float
    summed: float
    memory: float


def step(
    m: Model, machine: Machine, rate: float, data: int, fsdp: int, rows: int, tokens: int, passes: int = 3
) -> Step:
    """A step of rows x tokens a GPU on data x fsdp GPUs.

    Args:
      rate: operations a second.
      passes: products with each frozen weight: 2, or 3 where the backward pass computes all again.
    """
    count, gpus = rows * tokens, data * fsdp
    operations = 2.0 * count * (passes * m.linear + 2 * m.head)
    operations += (passes + 1.5) * 2 * rows * m.layers * tokens**2 * m.attention_width
    compute = operations / rate
    link = machine.nvlink if fsdp <= HOST else machine.infiniband
    codes, share = CODE_BYTES * m.linear, (fsdp - 1) / fsdp
    gathered = share * (
        2 * codes + 2 * m.head + 2 * count * m.hidden
    )  # forwards and backwards; head; embedded tokens
    gather = gathered / link
    summed = 2 * (gpus - 1) / gpus * 4 * m.adapter
    reduce = summed / (machine.nvlink if gpus <= HOST else machine.infiniband)
    kept = 2 * count * m.layers * (m.hidden if passes == 3 else m.everything)
    working = 2 * count * (12 * m.hidden)  # of one layer, about
    held = (codes + 4 * m.head) / fsdp + (2 * codes / m.layers + 2 * m.head) * (fsdp > 1)
    memory = held + 4 * m.adapter * (1 + 1 + 0.5) + kept + working
    total = compute + gather + reduce
    return Step(compute, gather, reduce, total, gathered, summed, memory)


def fits(m: Model, machine: Machine, fsdp: int) -> bool:
    """As devices.make_layout decides."""
    return CODE_BYTES * m.linear + 4 * m.head <= 0.6 * machine.memory * fsdp


def lines(name: str, gpus: int, machine: Machine, rows: int, tokens: int, passes: int) -> list[str]:
    """The base whole on each GPU, split over a host's, and split over all."""
    m, found = model(name), []
    alone = step(m, machine, RATES[name], 1, 1, rows, tokens, passes).compute
    for fsdp in sorted({1, min(gpus, HOST), gpus}):
        if fits(m, machine, fsdp):
            s = step(m, machine, RATES[name], gpus // fsdp, fsdp, rows, tokens, passes)
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
    for name, rows, tokens, passes in (("8B", 4, 2048, 2), ("70B", 1, 8192, 3), ("405B", 1, 8192, 3)):
        compute = step(model(name), machine, RATES[name], 1, 1, rows, tokens, passes).compute
        print(f"\n{name}, {rows}×{tokens} tokens a GPU, {compute * 1e3:,.0f} ms of compute\n")
        print(
            "| model | GPUs | data × fsdp | gathered, GB (ms) | summed, GB (ms) | step, ms | tokens/s | of ideal | GB |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for gpus in (1, 2, 4, 8, 32, 128, 512):
            print(
                "\n".join(lines(name, gpus, machine, rows, tokens, passes))
                or f"| {name} | {gpus} | does not fit |"
            )


if __name__ == "__main__":
    main()
