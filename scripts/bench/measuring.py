"""What the benchmarks measure on a GPU: its ceilings, and what each kind of kernel took in a profiled call.

python scripts/bench/measuring.py        # the ceilings alone, the last line as JSON
"""

import collections
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import overlap
import roofline

# (rows, in, out) of the products of a step of Llama-3.1-8B; of the head a chunk of the loss
PRODUCTS = {
    "gate/up": (8192, 4096, 28672),
    "down": (8192, 14336, 4096),
    "q/k/v": (8192, 4096, 6144),
    "o": (8192, 4096, 4096),
    "head": (1024, 4096, 128256),
}


def call_seconds(call, *args, queued: int = 20) -> list[float]:
    """Of 7 runs of so many queued calls each: what a call took."""
    import jax

    call = jax.jit(call)
    jax.block_until_ready(call(*args))
    times = []
    for _ in range(7):
        began = time.perf_counter()
        for _ in range(queued - 1):
            call(*args)
        jax.block_until_ready(call(*args))
        times.append((time.perf_counter() - began) / queued)
    return times


def seconds_a_call(call, *args) -> float:
    return statistics.median(call_seconds(call, *args))


def peak_gb() -> float:
    """Of this process so far, on the GPU that has the largest; 0 where none says."""
    import jax

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max(each.get("peak_bytes_in_use", 0) for each in stats) / 1e9


def ceilings_here() -> roofline.Ceilings | None:
    """Of this machine's GPU, on random data; None where there is none.

    A process of its own measures them, so that the peak memory of this one is that of what it runs; it has the GPU's
    memory to itself if JAX has not begun here. Several runs share them in the file that JAXTUNE_BENCH_CEILINGS names.
    """
    shared = os.environ.get("JAXTUNE_BENCH_CEILINGS")
    if shared and Path(shared).exists():
        print(f"ceilings as in {shared}")
        return roofline.Ceilings(**json.loads(Path(shared).read_text()))
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, str(Path(__file__).resolve())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring this machine's ceilings failed:\n{done.stderr}")
    *said, found = done.stdout.splitlines()
    for line in said:
        print(line, flush=True)
    rates = json.loads(found)
    if rates is None:
        return None
    if shared:
        Path(shared).write_text(found)
    return roofline.Ceilings(**rates)


def draw(shape: tuple[int, ...], dtype: str):
    """In pieces, since a GPU's random numbers take 16 bytes each while they are made."""
    import jax

    keys = jax.random.split(jax.random.key(0), shape[0])
    row = lambda key: jax.random.normal(key, shape[1:], "bfloat16").astype(dtype)  # noqa: E731
    return jax.lax.map(row, keys, batch_size=256)


def random(shape: tuple[int, ...], dtype: str = "bfloat16"):
    import jax

    return jax.jit(draw, static_argnums=(0, 1))(shape, dtype)


def forward(x, w):
    """x [N, in], w [out, in] -> [N, out]."""
    import jax

    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type="bfloat16")


def back(dy, w):
    """dy [N, out], w [out, in] -> [N, in]."""
    return dy @ w


def product_rates(eight: bool, room: float) -> dict[str, float]:
    """Operations/s of a step's products of 16 bits, or of `eight`, whose arrays are at most `room` bytes.

    A tenth of a second of each, three times: in the first round XLA chooses kernels, in the second the card settles at
    its power limit, as it does in a step; the third counts.
    """
    rates = {}
    for name, (rows, width, out) in 3 * [*PRODUCTS.items()]:
        if 2 * (rows * width + width * out + rows * out) > room or (eight and name == "head"):
            continue
        work = 2 * rows * width * out
        kinds = ("float8_e4m3fn", "float8_e5m2") if eight else ("bfloat16", "bfloat16")  # forward, back
        x, dy, w = (
            random((rows, width), kinds[0]),
            random((rows, out), kinds[1]),
            random((out, width), kinds[0]),
        )
        # in 8 bits both sides are contracted along their last axis
        turned = (forward, dy, w.T.copy()) if eight else (back, dy, w)
        for way, call in (("forward", (forward, x, w)), ("back", turned)):
            times = call_seconds(*call, queued=math.ceil(1e13 / work))
            rates[f"{name} {way}"] = work / statistics.median(times)
    return rates


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


def main() -> None:
    """For `ceilings_here`: the last line is JSON, null where there is no GPU."""
    import jax

    device = jax.devices()[0]
    if device.platform != "gpu":
        print("null")
        return
    room = device.memory_stats()["bytes_limit"] / 4
    copied, read = (random((8192, int(min(most, room / 4)) // 8192)) for most in (1 << 29, 1 << 30))
    found: dict[str, float] = {
        "bandwidth": 2 * copied.nbytes / seconds_a_call(lambda x: x + 1, copied),
        "read": read.nbytes / seconds_a_call(lambda x: x.max(1), read),
    }
    del copied, read
    for name, eight in (("bf16", False), ("fp8", True)):
        rates = product_rates(eight, room)
        best = max(rates, key=lambda way: rates[way])
        found[name] = rates[best]
        each = ", ".join(f"{way} {rate / 1e12:.0f}" for way, rate in rates.items())
        print(f"products of {name}, TFLOP/s: {each}; the ceiling is {best}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
