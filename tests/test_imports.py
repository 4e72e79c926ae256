"""The shape of the package: imports go one way, importing does nothing, no file is long."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jaxtune"
# The order of the pipeline. A module may import from its own stage and from earlier ones.
STAGES = [
    {"config"},
    {"hub", "formats"},
    {"quant"},
    {"kernels"},
    {"models"},
    {"load"},
    {"lora"},
    {"data"},
    {"optim"},
    {"step"},
    {"generate"},
    {"export"},
    {"model"},
    {"checkpoint", "metrics", "signals"},
    {"trainer"},
    {"tasks"},
    {"command_line"},
    {"job"},
    {"dry_run"},
    {"train"},
]
STAGE_OF = {name: number for number, names in enumerate(STAGES) for name in names}
JUDGES = {"torch", "trl", "peft", "bitsandbytes", "accelerate", "vllm"}
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def _names(path: Path) -> list[str]:
    """Dotted names of every import of a module, those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute in this package"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for name in _names(path):
        top, *rest = name.split(".")
        assert top not in JUDGES, f"{name}: only tests import {top}"
        if top == "jaxtune" and rest and room != "__init__":
            assert room in STAGE_OF, f"{path}: give {room!r} its place in STAGES"
            assert rest[0] in STAGE_OF, f"{path} imports {name}: import from the module that defines it"
            assert STAGE_OF[rest[0]] <= STAGE_OF[room], f"{room} must not import the later stage {rest[0]}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 500


def _run(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)


def test_importing_has_no_side_effects():
    code = f"""
import os, sys, logging, warnings
before = dict(os.environ), os.listdir(), logging.getLogger().level, list(logging.getLogger().handlers)
import jax
settings = dict(jax.config.values)
import jaxtune, jaxtune.trainer, jaxtune.train
after = dict(os.environ), os.listdir(), logging.getLogger().level, list(logging.getLogger().handlers)
assert before == after, "importing changed the environment, the folder or the root logger"
assert settings == dict(jax.config.values), "importing changed a setting of jax"
from jax._src import xla_bridge
assert not xla_bridge._backends, "importing started a jax backend"
judges = {JUDGES!r} & set(sys.modules)
assert not judges, judges
"""
    # transformers imports torch by itself where it is installed, unless it is told not to.
    done = _run(code, USE_TORCH="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_help_is_quick_and_needs_no_jax():
    code = """
import sys
import jaxtune.train
try:
    jaxtune.train.main(["--help"])
except SystemExit as stop:
    assert stop.code == 0
slow = {"jax", "flax", "transformers", "datasets", "matplotlib"} & set(sys.modules)
assert not slow, slow
"""
    done = _run(code)
    assert done.returncode == 0, done.stderr
    assert "--learning-rate" in done.stdout or "--learning_rate" in done.stdout
