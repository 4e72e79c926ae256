"""Quantising in worker processes gives what quantising in place gives."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Kind

from jaxtune.export import quantise_pool
from jaxtune.export.quantise_pool import QuantisePool
from jaxtune.export.quantisers import quantise

VALUES = np.random.default_rng(0).normal(size=(1037, 512)).astype(np.float32)
IMPORTANCE = np.random.default_rng(1).random(512).astype(np.float32)


@pytest.fixture(scope="module")
def pool():
    with QuantisePool(2) as pool:
        yield pool


@pytest.mark.parametrize("importance", [None, IMPORTANCE], ids=["plain", "importance"])
@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q8_0, Kind.Q4_K, Kind.IQ4_XS])
def test_the_same_blocks(pool, kind, importance):
    seen = []
    blocks = pool.quantise(VALUES, kind, importance, lambda n: seen.append((n, threading.get_ident())))
    np.testing.assert_array_equal(blocks, quantise(VALUES, kind, importance))
    assert sum(n for n, _ in seen) == blocks.nbytes and len(seen) > 4


def test_small_and_plain_tensors_start_no_process():
    with QuantisePool(2) as pool:
        np.testing.assert_array_equal(pool.quantise(VALUES[0], Kind.F32), VALUES[:1].view(np.uint8))
        pool.quantise(VALUES[:4], Kind.Q4_K)
        assert not pool._workers
    with QuantisePool(1) as pool:
        np.testing.assert_array_equal(pool.quantise(VALUES, Kind.Q8_0), quantise(VALUES, Kind.Q8_0))
        assert not pool._workers


def test_errors_come_back_and_the_pool_lives_on(pool):
    bad = VALUES.copy()
    bad[1000, 3] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        pool.quantise(bad, Kind.Q4_K)
    np.testing.assert_array_equal(pool.quantise(VALUES, Kind.Q5_K), quantise(VALUES, Kind.Q5_K))


def test_a_worker_that_dies_is_told():
    with QuantisePool(2) as pool:
        pool.quantise(VALUES, Kind.Q8_0)
        pool._workers[0]._process.kill()
        with pytest.raises(RuntimeError, match="ended with status -9"):
            pool.quantise(VALUES, Kind.Q8_0)


def test_workers_do_not_run_the_users_script_and_end_with_it(tmp_path):
    """A script without `if __name__ == "__main__"`, which dies without leaving the pool."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, numpy as np\n"
        "from gguf.constants import GGMLQuantizationType as Kind\n"
        "from jaxtune.export.quantise_pool import QuantisePool\n"
        "print('script')\n"
        "pool = QuantisePool(2)\n"
        "pool.quantise(np.ones((4096, 256), np.float32), Kind.Q8_0)\n"
        "print(*[worker._process.pid for worker in pool._workers], flush=True)\n"
        "os._exit(0)\n"
    )
    package = os.path.dirname(os.path.dirname(os.path.dirname(quantise_pool.__file__)))
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": package},
    )
    first, pids = done.stdout.splitlines()
    assert (first, done.stderr) == ("script", "") and len(pids.split()) == 2
    for pid in map(int, pids.split()):
        _wait_for_end(pid)


def _wait_for_end(pid: int) -> None:
    for _ in range(100):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except FileNotFoundError:
            return
        threading.Event().wait(0.1)
    raise AssertionError(f"worker {pid} lives on")
