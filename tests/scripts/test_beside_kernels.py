"""Scripts that measure other libraries do not show them scripts/bench/kernels.py: transformers would import it for a
package of Hugging Face's, and jaxtune with it, which need not be installed there."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"
CODE = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
sys.argv = [sys.argv[2], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit:
    sys.exit(sys.path[0] == sys.argv[0].rpartition("/")[0])
"""


@pytest.mark.parametrize("name", ["unsloth_step", "vllm_rollouts", "peft_comparison", "grpo_comparison"])
def test_its_folder_is_not_searched(name):
    done = subprocess.run([sys.executable, "-c", CODE, str(BENCH), str(BENCH / f"{name}.py")], timeout=60)
    assert done.returncode == 0
