"""scripts/bench/generate.py runs on a CPU, on a model small enough."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "generate.py"


def test_a_tiny_model(tmp_path):
    sizes = {"model": "tiny", "sequences": 4, "group": 2, "prompt": 16, "new": 32, "steps": 1}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, str(SCRIPT), *options, "--weights", "merged", "lora", "--out", str(tmp_path)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(SCRIPT.parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "generate.json").read_text())
    assert [result["weights"] for result in results] == ["merged", "lora"]
    for result in results:
        assert (
            result["sequences"] == 4
            and result["tokens_per_second"] > 0
            and result["step_ms"].keys() == {"16", "32"}
        )
