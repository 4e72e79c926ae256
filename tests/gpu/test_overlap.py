"""Of programs for H200s (`pytest -m gpu`; compiled, not run): every large transfer has compute beside it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "scripts" / "bench"
READ = "import json, sys, overlap; print(json.dumps(overlap.windows(open(sys.argv[1]).read())))"
pytestmark = pytest.mark.gpu


def transfers(words: str, folder: Path) -> list[tuple[str, int, float, float, float]]:
    """(name, how often, bytes, seconds at best, seconds of kernels beside it) of the program that step.py compiles."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{BENCH}"}
    command = [sys.executable, BENCH / "step.py", *f"--compile_for h200 --out {folder} {words}".split()]
    subprocess.run(command, env=env, check=True, timeout=600)
    (program,) = folder.glob("*.hlo.txt")
    read = [sys.executable, "-c", READ, program]
    return json.loads(subprocess.run(read, env=env, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("remat", ["none", "all", "all+offload"])
def test_gathers_of_codes_and_of_the_head_run_beside_layers(remat, tmp_path):
    found = transfers(f"--devices 2 --layout fsdp --model llama-3.1-8b --remat {remat}", tmp_path)
    gathers = [transfer for transfer in found if transfer[0].startswith("all-gather")]
    loops = [(takes, beside) for _, times, _, takes, beside in gathers if times > 1]
    assert len(loops) == 2  # forwards and backwards, a layer at a time
    for takes, beside in loops:
        assert beside > 4 * takes, gathers
    head = [beside for _, _, size, _, beside in gathers if size == 2 * 128256 * 4096]
    assert len(head) == 1 and head[0] > 4e-3, gathers


@pytest.mark.parametrize("batch", ["4x2048", "1x32768"])
def test_copies_to_and_from_the_host_run_beside_layers(batch, tmp_path):
    """All that a layer sends, and all that is fetched for one, in the time of kernels that it has at best."""
    found = transfers(f"--batch {batch} --remat attention+residual+offload", tmp_path)
    copies = [transfer for transfer in found if transfer[1] > 1 and transfer[2] > 1e6]
    sent = [transfer for transfer in copies if "update" in transfer[0]]
    fetched = [transfer for transfer in copies if "update" not in transfer[0]]
    assert len(sent) == len(fetched) == 4  # a layer's input, attention's output and statistics, the residual
    for group in (sent, fetched):
        takes = sum(transfer[3] for transfer in group)
        assert max(transfer[4] for transfer in group) > takes, group
        assert min(transfer[4] for transfer in group) > takes - max(transfer[3] for transfer in group), group
