"""What a compiled GPU program must cost: each kernel's bytes and operations, and the time that they take at best.

    python scripts/bench/roofline.py program.hlo.txt [rows]

Reads the text of an optimised HLO module (`compiled.as_text()`), multiplies the bodies of loops by their trip counts
and sums max(bytes / bandwidth, operations / rate) by kind. Loops whose count the compiler does not know (the chunks of
the loss) count `unknown_trips` times; attention is over whole rows, or over each of `documents` in a row. What it does
not see: how near a kernel comes to its floor, launch gaps, and what runs at the same time (`kept` copies mostly do).
"""

import collections
import functools
import math
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8, "u8": 1, "s8": 1, "pred": 1,
         "f8e4m3fn": 1, "f8e5m2": 1, "u4": 0.5, "s4": 0.5}  # fmt: skip
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
INSTRUCTION = re.compile(r"^(ROOT )?%?([\w.\-]+) = (\([^=]*?\)|\S+) ([\w\-]+)\((.*)$")
FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "iota", "after-all", "partition-id"}
# (-start where XLA lets it run beside other kernels)
COLLECTIVES = {
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
}
# What has some of its first operand's elements, and what has one for each
PARTS = {"bitcast", "dynamic-slice", "gather", "slice"}
POINTWISE = {"add", "convert", "divide", "maximum", "minimum", "multiply", "negate", "select", "subtract"}
SKINNY = 64  # a product with a side this short is an adapter's


class Ceilings(NamedTuple):
    """bytes/s, operations/s of bf16 products, of fp8 products, of attention, bytes/s
    that a GPU gets from others of its host, from or to the host's memory, and of kernels that only read."""

    bandwidth: float = 4.3e12
    bf16: float = 800e12
    fp8: float = 1450e12
    attention: float = 580e12
    link: float = 450e9  # NVLink 4, one direction
    host: float = 55e9  # PCIe 5
    read: float = 4.3e12

    def said(self) -> str:
        return (
            f"copy {self.bandwidth / 1e12:.2f} TB/s, products of bf16 {self.bf16 / 1e12:.0f} and of fp8 "
            f"{self.fp8 / 1e12:.0f} TFLOP/s"
        )


# As one did at best: only reading, and products before it drew 700 W. In a long run, see docs/benchmarks.md: 3.25 TB/s
# of copying, 700 TFLOP/s.
H200 = Ceilings()


class Kernel(NamedTuple):
    """One instruction: times run, kind, bytes moved and operations of one run, seconds of all at best.

    inner: the library call or custom kernel inside a fusion with slices of stacks; traces name that.
    """

    name: str
    kind: str
    times: int
    bytes: float
    flops: float
    seconds: float
    op_name: str
    inner: str = ""


class Instruction(NamedTuple):
    name: str
    type: str
    op: str
    operands: list[str]
    text: str
    root: bool


def shapes(text: str) -> list[tuple[str, list[int]]]:
    return [(d, [int(n) for n in dims.split(",") if n]) for d, dims in SHAPE.findall(text) if d in BYTES]


def size(text: str) -> float:
    """Bytes of a (tuple) type."""
    total = 0.0
    for dtype, dims in shapes(text):
        count = 1
        for n in dims:
            count *= n
        total += count * BYTES[dtype]
    return total


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """HLO text -> computations, and the entry's name."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in re.sub(r"/\*index=\d+\*/", "", text).splitlines():
        header = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line)
        if header:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := INSTRUCTION.match(line.strip())):
            root, name, kind, op, rest = found.groups()
            arguments = rest.split("), ")[0] if op != "parameter" else ""
            current.append(
                Instruction(name, kind, op, re.findall(r"%([\w.\-]+)", arguments), line, bool(root))
            )
    return computations, entry


def called(instruction: Instruction, key: str) -> str:
    found = re.search(rf"{key}=%?([\w.\-]+)", instruction.text)
    assert found, instruction.text
    return found[1]


def count(text: str) -> int:
    """Elements of an array type."""
    return math.prod(shapes(text)[0][1]) if shapes(text) else 0


def moved_by_fusion(body: list[Instruction]) -> float:
    """Bytes that a fusion reads and writes: of what it only takes slices of, the slices, be they of what it computes
    from each element; in place, the update."""
    types = {i.name: i.type for i in body}
    producers = {i.name: i for i in body}
    users = collections.defaultdict(list)
    for i in body:
        for operand in i.operands:
            users[operand].append(i)

    def written(name: str) -> float:
        i = producers[name]
        if i.op == "dynamic-update-slice":
            return size(types[i.operands[1]])
        return sum(written(o) for o in i.operands) if i.op == "tuple" else size(i.type)

    @functools.cache
    def used(name: str) -> float:
        """Which part of an array's elements."""
        whole, taken = count(types[name]), 0.0
        for u in users[name]:
            first = u.operands[0] == name
            if first and u.op == "dynamic-update-slice":
                continue
            if not ((first and u.op in PARTS) or (u.op in POINTWISE and count(u.type) == whole)):
                return 1
            taken += count(u.type) * (1 if u.root else used(u.name))
        return min(1, taken / max(whole, 1))

    moved = sum(size(i.type) * used(i.name) for i in body if i.op == "parameter")
    return moved + sum(written(i.name) for i in body if i.root)


def product(i: Instruction, types: dict[str, str]) -> tuple[float, float, bool]:
    """(bytes, operations, whether it is skinny) of a matrix product: a call of a library or a dot."""
    lhs = shapes(types[i.operands[0]])[0][1]
    found = re.search(r'lhs_contracting_(?:dimensions":\[([^\]]*)\]|dims=\{([^}]*)\})', i.text)
    assert found, i.text
    inner = 1
    for axis in re.findall(r"\d+", found[1] or found[2]):
        inner *= lhs[int(axis)]
    result = SHAPE.search(i.type)
    assert result
    dims = shapes(result[0])[0][1]
    count = 1
    for n in dims:
        count *= n
    moved = size(result[0]) + sum(size(types[o]) for o in i.operands)
    return moved, 2.0 * count * inner, min(inner, *dims[-2:]) <= SKINNY


def attention(i: Instruction, types: dict[str, str], documents: int = 1) -> float:
    """Operations of causal attention over rows of so many documents of one length, forward or backward."""
    batch, tokens, heads, h = shapes(types[i.operands[0]])[0][1]
    return 2.0 * batch * heads * tokens * (tokens / documents) * h * (2.5 if "Backward" in i.text else 1)


def kind_of(i: Instruction, op_name: str, default: str) -> str:
    for scope in ("loss", "optimizer", "lora", "dequantise"):
        if re.search(rf"(?:^|[/(]){scope}(?:[/)]|$)", op_name):
            return scope
    if i.op == "fusion-start" or "dynamic_update_slice" in op_name or "dynamic_index_in_dim" in op_name:
        return "kept"
    return default


def kernels(text: str, ceilings: Ceilings = H200, unknown_trips: int = 8, documents: int = 1) -> list[Kernel]:
    """Every kernel of an optimised HLO module, on rows of so many documents."""
    computations, entry = parse(text)
    found: list[Kernel] = []

    def add(i: Instruction, types: dict[str, str], times: int) -> None:
        moved, hero = size(i.type) + sum(size(types.get(o, "")) for o in i.operands), i
        if i.op in ("fusion", "fusion-start"):
            body = computations[called(i, "calls")]
            moved, types = moved_by_fusion(body), {inner.name: inner.type for inner in body}
            # a product that XLA made a kernel for, or a call that reads and writes slices of stacks
            hero = next((inner for inner in body if inner.op in ("dot", "custom-call")), i)
        op_name = re.search(r'op_name="([^"]*)"', hero.text)
        name, kind, flops, rate = op_name[1] if op_name else "", "element-wise", 0.0, ceilings.bf16
        if hero.op == "custom-call" and "$fmha" in hero.text:
            kind, flops, rate = "attention", attention(hero, types, documents), ceilings.attention
        elif hero.op == "dot" or "$matmul" in hero.text or "__cublas$gemm" in hero.text:
            read, flops, skinny = product(hero, types)
            moved = read if hero is i else moved
            kind = "lora" if skinny else "products"
            rate = ceilings.fp8 if "f8e" in types[hero.operands[0]] else rate
        elif i.op.startswith("copy"):
            kind = "copies"
        bandwidth = ceilings.bandwidth
        if is_collective(i):
            kind, moved, bandwidth = "collectives", sum(received(i).values()), ceilings.link
        seconds = times * max(moved / bandwidth, flops / rate)
        kind = kind if kind in ("attention", "lora", "collectives") else kind_of(i, name, kind)
        found.append(Kernel(i.name, kind, times, moved, flops, seconds, name, hero.name))

    for i, types, times in executed(computations, entry, unknown_trips):
        if "AllocateBuffer" not in i.text:
            add(i, types, times)
    return found


def executed(
    computations: dict[str, list[Instruction]], computation: str, unknown_trips: int, times: int = 1
) -> Iterator[tuple[Instruction, dict[str, str], int]]:
    """(instruction, types of those beside it, how often it runs) of a computation and of what it calls."""
    types = {i.name: i.type for i in computations[computation]}
    for i in computations[computation]:
        if i.op == "while":
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', i.text)
            trips = int(trips[1]) if trips else unknown_trips
            yield from executed(computations, called(i, "body"), unknown_trips, times * trips)
        elif i.op == "call":
            yield from executed(computations, called(i, "to_apply"), unknown_trips, times)
        elif i.op == "async-start":
            yield from executed(computations, called(i, "calls"), unknown_trips, times)
        elif i.op not in FREE and i.op != "conditional" and not i.op.endswith("-done"):
            yield i, types, times


def is_collective(i: Instruction) -> bool:
    return i.op.removesuffix("-start") in COLLECTIVES


def received(i: Instruction) -> dict[str, float]:
    """Bytes of each dtype that a collective leaves on a device; a sum of N parts sends and receives twice that."""
    found = shapes(i.type)
    if i.type.startswith("(("):  # of one that starts: what it takes, then what it gives
        found = found[len(found) // 2 :]
    count: collections.Counter[str] = collections.Counter()
    for dtype, dims in found:
        count[dtype] += math.prod(dims) * BYTES[dtype]
    return dict(count)


def traffic(text: str, unknown_trips: int = 8) -> dict[tuple[str, str], float]:
    """(collective, dtype) -> bytes that all of them leave on a device in one run of an optimised HLO module."""
    computations, entry = parse(text)
    total: collections.Counter[tuple[str, str]] = collections.Counter()
    for i, _, times in executed(computations, entry, unknown_trips):
        if is_collective(i):
            for dtype, count in received(i).items():
                total[i.op.removesuffix("-start"), dtype] += times * count
    return dict(total)


def by_kind(rows: list[Kernel]) -> dict[str, float]:
    """Seconds at best of each kind, longest first."""
    totals: collections.Counter[str] = collections.Counter()
    for row in rows:
        totals[row.kind] += row.seconds
    return dict(totals.most_common())


def main() -> None:
    with open(sys.argv[1]) as file:
        rows = kernels(file.read())
    for kind, seconds in by_kind(rows).items():
        print(f"{kind:14s} {seconds * 1e3:9.2f} ms")
    print(f"{'all':14s} {sum(row.seconds for row in rows) * 1e3:9.2f} ms\n")
    for row in sorted(rows, key=lambda row: -row.seconds)[: int(sys.argv[2]) if len(sys.argv) > 2 else 30]:
        print(
            f"{row.seconds * 1e3:8.2f} ms {row.times:4d} x {row.kind:13s} {row.bytes / 1e6:9.1f} MB "
            f"{row.flops / 1e9:9.1f} GFLOP  {row.name[:36]:36s} {row.op_name[-70:]}"
        )


if __name__ == "__main__":
    main()
