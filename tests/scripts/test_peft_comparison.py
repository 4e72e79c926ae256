"""scripts/bench/peft_comparison.py runs on a CPU, on a model small enough."""

import json
import os
import subprocess
import sys
from pathlib import Path

import tiny_models
from tolerances import BF16_LOSS

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "peft_comparison.py"


def test_a_tiny_model(tmp_path):
    config = tiny_models.make_config("llama", max_position_embeddings=1024)
    tiny_models.save(tiny_models.make_model(config), tmp_path / "model")
    for name in ("train", "test"):
        rows = [{"question": f"{i} + {i}?", "answer": f"{2 * i}"} for i in range(48)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folders = ["--model", tmp_path / "model", "--gsm8k", tmp_path, "--out", tmp_path / "out"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(SCRIPT.parents[2])}
    for command in ("prepare", "jaxtune", "peft", "report"):
        words = [command, *folders, "--steps", "6", "--held-out", "16"]
        done = subprocess.run(
            [sys.executable, SCRIPT, *words], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr[-2000:]
    for task in ("orders", "gsm8k"):
        ours, peft = (
            json.loads((tmp_path / "out" / f"{name}-{task}.json").read_text()) for name in ("jaxtune", "peft")
        )
        assert len(ours["loss"]) == 6 and abs(ours["eval_before"] - peft["eval_before"]) < BF16_LOSS
