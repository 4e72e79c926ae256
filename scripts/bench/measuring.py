"""What the benchmarks measure on a GPU: its ceilings, and what each kind of kernel took in a profiled call."""

import collections
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import overlap
import roofline


def call_seconds(call, *args) -> list[float]:
    """Of 7 runs of 20 queued calls each: what a call took."""
    import jax

    call = jax.jit(call)
    jax.block_until_ready(call(*args))
    times = []
    for _ in range(7):
        began = time.perf_counter()
        for _ in range(20):
            last = call(*args)
        jax.block_until_ready(last)
        times.append((time.perf_counter() - began) / 20)
    return times


def seconds_a_call(call, *args) -> float:
    return statistics.median(call_seconds(call, *args))


def ceilings_here() -> roofline.Ceilings:
    """Copy bandwidth and product rates of this GPU on random data."""
    import jax
    import jax.numpy as jnp

    big = jax.random.normal(jax.random.key(0), (1 << 29,), jnp.bfloat16)
    copied = 4 * big.size / seconds_a_call(lambda x: x + 1, big)
    a, b = (
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
        for i, shape in ((1, (8192, 4096)), (2, (14336, 4096)))
    )
    product = lambda a, b: jnp.dot(a, b.T, preferred_element_type=jnp.bfloat16)  # noqa: E731
    work = 2 * 8192 * 4096 * 14336
    rates = [
        work / seconds_a_call(product, a.astype(kind), b.astype(kind))
        for kind in (jnp.bfloat16, jnp.float8_e4m3fn)
    ]
    return roofline.Ceilings()._replace(bandwidth=copied, bf16=rates[0], fp8=rates[1])


def profile(
    step, text: str, ceilings, unknown_trips: int = 8, documents: int = 1
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Milliseconds of each kind of kernel in one step and `gaps`, when none ran; and each kernel beside its floor.

    A kernel's `launches` are counted as they happened. unknown_trips, documents: as of `roofline.kernels`.
    """
    import jax

    rows: dict[str, roofline.Kernel] = {}
    for row in roofline.kernels(text, ceilings, unknown_trips, documents):
        rows[row.name] = row
        rows.setdefault(row.inner, row)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            step()
        trace = jax.profiler.ProfileData.from_file(str(next(Path(folder).rglob("*.xplane.pb"))))
    found = sorted(overlap.device_events(trace), key=lambda event: event[2])
    events = [event[1:] for event in found]
    took: collections.Counter[str] = collections.Counter()
    launches = collections.Counter(name for name, _, _ in events)
    for name, start, end in events:
        took[name] += (end - start) / 1e6
    kinds: collections.Counter[str] = collections.Counter()
    table = []
    for name, milliseconds in took.most_common():
        row = rows.get(name)
        copying = re.match(
            "loop_dynamic_(update_)?slice", name
        )  # traces name the inside of an asynchronous fusion
        kind = row.kind if row else "kept" if copying else "other"
        kinds[kind] += milliseconds
        floor, where = (row.seconds * 1e3, row.op_name) if row else (0.0, "")
        table.append({"kernel": name, "ms": round(milliseconds, 3), "floor": round(floor, 3), "op": where,
                      "kind": kind, "launches": launches[name]})  # fmt: skip
    busy, end = 0.0, events[0][1]
    for _, start, stop in events:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    kinds["gaps"] = (end - events[0][1] - busy) / 1e6
    if any(overlap.COLLECTIVE.search(name) for name, _, _ in events):
        kinds["collectives"], kinds["collectives alone"] = overlap.exposed(found)
    return {kind: round(value, 2) for kind, value in kinds.most_common()}, table


def show_profile(took: dict[str, float], floor: dict[str, float], kernels: list[dict[str, Any]]) -> None:
    """What `profile` found, and the kernels furthest above their floor."""
    print("          took  ", took, "\n          floor ", floor, flush=True)
    for row in sorted(kernels, key=lambda k: k["floor"] - k["ms"])[:25]:
        print(
            f"          {row['ms']:8.2f} ms, floor {row['floor']:8.2f}  {row['launches']:5d} x  {row['kind']:13s} "
            f"{row['kernel'][:40]:40s} {row['op'][-60:]}"
        )
