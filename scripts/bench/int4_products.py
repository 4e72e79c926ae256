"""vLLM's products of few rows with 4-bit weights, Marlin and Machete, at the shapes of kernels.py's `decode` lines.

    python scripts/bench/int4_products.py [--rows 8 64] [--library _C_stable_libtorch.abi3.so]

They are for int4, whose values come from arithmetic, where NF4's come from a table; one bfloat16 scale for each 64
columns, as NF4 has. Weights rotate, so that none is left in the cache. `kernel` is the product's own time by CUPTI,
`all` what a call takes in a CUDA graph of calls. Needs a GPU, PyTorch and vLLM's library, of vLLM nothing else.
"""

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

MATRICES = {"one": (14336, 4096), "qkv": (6144, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
ROTATING = 180e6  # bytes of weights that rotate: three times the cache
GROUP, SCALE = 64, 0.01
INT4 = 1125899907892224  # vLLM's number of a 4-bit type whose values are stored with 8 added
REPEATS = 12


def installed() -> Path | None:
    """vLLM's library, without importing vLLM."""
    found = importlib.util.find_spec("vllm")
    return Path(found.origin).parent / "_C_stable_libtorch.abi3.so" if found and found.origin else None


def random(out: int, width: int) -> torch.Tensor:
    """Codes int32 [in/8, out], eight to a word, the first in the lowest bits."""
    return torch.randint(-(2**31), 2**31 - 1, (width // 8, out), dtype=torch.int, device="cuda")


def reference(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    values = torch.stack([(codes >> (4 * i)) & 15 for i in range(8)], 1).flatten(0, 1)
    return x.float() @ ((values.float() - 8) * SCALE)


def marlin(x: torch.Tensor, codes: torch.Tensor) -> Callable[[], torch.Tensor]:
    ops, (rows, width), out = torch.ops._C, x.shape, codes.shape[1]
    none = torch.empty(0, dtype=torch.int, device="cuda")
    room = torch.zeros(4 * 132, dtype=torch.int, device="cuda")
    weights = ops.gptq_marlin_repack(codes, none, width, out, 4, False)
    scales = torch.full((width // GROUP, out), SCALE, dtype=x.dtype, device="cuda")
    return lambda: ops.marlin_gemm(
        x, None, weights, None, scales, None, None, None, none, none, room, INT4, rows, out, width,
        True, False, True, False,
    )  # fmt: skip


def machete(x: torch.Tensor, codes: torch.Tensor) -> Callable[[], torch.Tensor]:
    ops, width, out = torch.ops._C, x.shape[1], codes.shape[1]
    weights = ops.machete_prepack_B(codes.t().contiguous().t(), x.dtype, INT4, x.dtype)
    scales = torch.full((width // GROUP, out), SCALE, dtype=x.dtype, device="cuda")
    return lambda: ops.machete_mm(x, weights, INT4, None, scales, None, GROUP, None, None, None)


def kernel_us(calls: list[Callable]) -> float:
    """Median of the longest kernel of each call."""
    cuda = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[cuda], acc_events=True) as profile:
        for call in calls * REPEATS:
            call()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in profile.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times.setdefault(event.name, []).append(event.device_time)
    return max(statistics.median(of_one) for of_one in times.values())


def graph_us(calls: list[Callable]) -> tuple[float, float, float]:
    """Median, shortest and longest time of a call in a CUDA graph of all."""
    with torch.cuda.stream(torch.cuda.Stream()):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times), min(times), max(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--library", type=Path, default=installed(), help="by default the installed vLLM's")
    args = parser.parse_args()
    if args.library is None or not args.library.is_file():
        parser.error(
            "no vLLM found: install vLLM 0.24, or name its _C_stable_libtorch.abi3.so with --library"
        )
    torch.ops.load_library(str(args.library))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name, (out, width) in MATRICES.items():
        weights = [random(out, width) for _ in range(1 + int(ROTATING / (out * width / 2)))]
        for rows in args.rows:
            x = torch.randn(rows, width, dtype=torch.bfloat16, device="cuda")
            wanted = reference(x, weights[0])
            for product in (marlin, machete):
                calls = [product(x, codes) for codes in weights]
                error = float((calls[0]().float() - wanted).norm() / wanted.norm())
                assert error < 0.01, f"{product.__name__} is wrong: {error:.3f} of the norm"
                kernel, (median, low, high) = kernel_us(calls), graph_us(calls)
                print(
                    f"{rows:4d} {name:8s} {product.__name__:8s} kernel {kernel:6.1f} us, all {median:6.1f} us "
                    f"({low:.1f} to {high:.1f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
