"""scripts/bench/generate.py runs on a CPU, on a model small enough."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxtune.generate import wave
from jaxtune.kernels import target
from jaxtune.kernels.decode_attention import decode_attention

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "generate.py"


def test_a_tiny_model(tmp_path):
    sizes = {"model": "tiny", "sequences": 4, "group": 2, "prompt": 16, "new": 32, "steps": 1}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, str(SCRIPT), *options, "--weights", "merged", "lora", "--out", str(tmp_path)]
    command += ["--plain", "decode_attention"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(SCRIPT.parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("  plain decode_attention\n")
    results = json.loads((tmp_path / "generate.json").read_text())
    assert [result["weights"] for result in results] == ["merged", "lora"]
    for result in results:
        assert (
            result["sequences"] == 4
            and result["tokens_per_second"] > 0
            and result["step_ms"].keys() == {"16", "32"}
        )


def test_plain_decode_attention(bench_module):
    plain = bench_module("plain").plain
    q, cache = (jax.ShapeDtypeStruct((2, 4, n, 64), jnp.bfloat16) for n in (1, 256))
    ends = jax.ShapeDtypeStruct((2,), jnp.int32)

    def runs_the_kernel(design):
        with target.tracing_for((9, 0)), plain(design):
            traced = jax.jit(lambda *a: decode_attention(*a)).trace(q, cache, cache, ends, ends)
            program = traced.lower(lowering_platforms=("cuda",)).as_text()
            return "mosaic_gpu" in program, wave.supported(q, cache)

    designs = ("", "decode_attention", "")
    assert [runs_the_kernel(design) for design in designs] == [(True, True), (False, False), (True, True)]
