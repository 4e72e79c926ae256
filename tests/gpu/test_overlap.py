"""Of a program for two H200s (`pytest -m gpu`; compiled, not run): every large gather has compute beside it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "scripts" / "bench"
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("remat", ["none", "all", "all+offload"])
def test_gathers_of_codes_and_of_the_head_run_beside_layers(remat, tmp_path):
    words = (
        f"--compile_for_h200 --devices 2 --layout fsdp --model llama-3.1-8b --remat {remat} --out {tmp_path}"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, BENCH / "step.py", *words.split()], env=env, check=True, timeout=600)
    (program,) = tmp_path.glob("*.hlo.txt")
    read = "import sys, overlap; [print(*w) for w in overlap.windows(open(sys.argv[1]).read())]"
    done = subprocess.run(
        [sys.executable, "-c", read, str(program)],
        env={**env, "PYTHONPATH": str(BENCH)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    gathers = [line.split() for line in done.stdout.splitlines() if line.startswith("all-gather")]
    loops = [(float(size), float(beside)) for _, times, size, beside in gathers if int(times) > 1]
    assert len(loops) == 2  # forwards and backwards, a layer at a time
    for size, beside in loops:
        assert beside > 4 * size / 450e9, gathers
    head = [float(beside) for _, _, size, beside in gathers if float(size) == 2 * 128256 * 4096]
    assert len(head) == 1 and head[0] > 4e-3, gathers
