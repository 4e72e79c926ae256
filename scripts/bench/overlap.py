"""What transfers run beside: in the schedule of a compiled GPU program, and collectives in a profile of its run.

    python scripts/bench/overlap.py program.hlo.txt

prints, for each collective and each copy from or to the host that runs beside others, MB that it moves, what it takes
at NVLink's or PCIe's rate and what the kernels between its start and its end take at best. One that is given less than
it takes is waited for.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import roofline

COLLECTIVE = re.compile(
    "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|nccl", re.IGNORECASE
)


HOST = "S(5)"  # XLA's name for the host's memory


class Window(NamedTuple):
    """One transfer: its start in a computation, how often it runs, bytes, seconds that it takes at best, and seconds of
    kernels at best until it is waited for: those that XLA puts on the stream of the products, so without its
    asynchronous copies."""

    name: str
    times: int
    bytes: float
    takes: float
    seconds: float


def windows(text: str, ceilings: roofline.Ceilings = roofline.H200, unknown_trips: int = 8) -> list[Window]:
    """The asynchronous collectives and copies from and to the host of an optimised, scheduled HLO module."""
    computations, entry = roofline.parse(text)
    rows = {row.name: row for row in roofline.kernels(text, ceilings, unknown_trips)}
    found: list[Window] = []

    def visit(computation: str, times: int) -> float:
        """Seconds of one run; notes the collectives in it."""
        total, began = 0.0, {}
        types = {i.name: i.type for i in computations[computation]}
        for i in computations[computation]:
            if i.op == "while":
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', i.text)
                count = int(trips[1]) if trips else unknown_trips
                total += count * visit(roofline.called(i, "body"), times * count)
            elif roofline.is_collective(i) and i.op.endswith("-start"):
                moved = sum(roofline.received(i).values())
                began[i.name] = (total, moved, moved / ceilings.link)
            elif i.op in ("async-start", "fusion-start") and HOST in i.type:
                moved = sliced(i, types)
                began[i.name] = (total, moved, moved / ceilings.host)
            elif i.op.endswith("-done") and i.operands and i.operands[0] in began:
                since, moved, takes = began[i.operands[0]]
                found.append(Window(i.operands[0], times, moved, takes, total - since))
            elif i.op != "fusion-start" and i.name in rows and not roofline.is_collective(i):
                total += rows[i.name].seconds / rows[i.name].times
        return total

    visit(entry, 1)
    return found


def sliced(i: roofline.Instruction, types: dict[str, str]) -> float:
    """Bytes of the slice of a stack on the host that a copy fetches or replaces; types: of the computation's others."""
    if "update" in i.name:
        return roofline.size(types[i.operands[1]])
    return roofline.size(i.type.rsplit("), ", 1)[1].rsplit(", ", 1)[0])


def device_events(trace: Any) -> Iterator[tuple[str, str, float, float]]:
    """(stream, HLO instruction or kernel name, start, end) in nanoseconds of what ran on the first GPU."""
    for plane in [plane for plane in trace.planes if "/device:GPU" in plane.name][:1]:
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    name = str(dict(event.stats).get("hlo_op", event.name))
                    yield line.name, name, event.start_ns, event.start_ns + event.duration_ns


def exposed(events: list[tuple[str, str, float, float]]) -> tuple[float, float]:
    """Milliseconds of collectives in events sorted by start, and those of them in which the products' stream stood
    still: the one with most work. Copies on streams of their own do not count as work beside a collective."""
    busy: Counter[str] = Counter()
    for stream, name, start, end in events:
        busy[stream] += 0 if COLLECTIVE.search(name) else end - start
    main = busy.most_common(1)[0][0]
    others = [event for event in events if event[0] == main and not COLLECTIVE.search(event[1])]
    total = alone = 0.0
    for _, name, start, end in events:
        if not COLLECTIVE.search(name):
            continue
        total, at = total + end - start, start
        for _, _, begin, stop in others:
            if stop <= at or begin >= end:
                continue
            alone, at = alone + max(0.0, begin - at), max(at, stop)
        alone += max(0.0, end - at)
    return total / 1e6, alone / 1e6


def main() -> None:
    with open(sys.argv[1]) as file:
        found = windows(file.read())
    for window in found:
        print(
            f"{window.times:4d} x {window.name:32s} {window.bytes / 1e6:9.1f} MB, {window.takes * 1e3:7.2f} ms at "
            f"best, beside {window.seconds * 1e3:8.2f} ms of kernels"
        )


if __name__ == "__main__":
    main()
