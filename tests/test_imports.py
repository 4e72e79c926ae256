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
    {"settings", "arguments", "compile_cache", "host_memory", "gpu_memory", "in_place"},
    {"config"},
    {"cluster"},
    {"hub", "formats", "processor"},
    {"images"},
    {"quant"},
    {"kernels"},
    {"models"},
    {"devices"},
    {"load"},
    {"lora"},
    {"data"},
    {"optim"},
    {"step"},
    {"budget"},
    {"generate"},
    {"export"},
    {"model"},
    {"fast"},
    {"checkpoint", "metrics", "signals"},
    {"training_loop"},
    {"trainer"},
    {"tasks"},
    {"command_line"},
    {"program"},
    {"job"},
    {"dry_run"},
    {"rl"},
    {"evaluate"},
    {"train", "export.__main__", "chat", "evaluate.__main__", "evaluate.reading.__main__"},
]
STAGE_OF = {name: number for number, names in enumerate(STAGES) for name in names}
JUDGES = {"torch", "trl", "peft", "bitsandbytes", "accelerate", "vllm"}
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def _is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _names(node: ast.AST) -> list[str]:
    """Dotted names of every import below a node, those inside functions too, those for the type checker not."""
    if _is_for_types_only(node):
        return []
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: imports are absolute in this package"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for child in ast.iter_child_nodes(node) for name in _names(child)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    room = (
        ".".join(parts) if parts[-1] == "__main__" else parts[0]
    )  # a program stands behind all that it starts
    for name in _names(ast.parse(path.read_text())):
        top, *rest = name.split(".")
        assert top not in JUDGES, f"{name}: only tests import {top}"
        if top == "jaxtune" and rest and room != "__init__":
            assert room in STAGE_OF, f"{path}: give {room!r} its place in STAGES"
            assert rest[0] in STAGE_OF, f"{path} imports {name}: import from the module that defines it"
            assert STAGE_OF[rest[0]] <= STAGE_OF[room], f"{room} must not import the later stage {rest[0]}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= 500, f"{path.name} has {lines} lines"


def _run(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)


def test_importing_has_no_side_effects():
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES]
    code = f"""
import importlib, logging, os, sys

import jaxtune
judges = {JUDGES!r} & set(sys.modules)
assert not judges, f"import jaxtune imported {{judges}}"
# transformers imports torch where it can; jaxtune has to work where it cannot.
sys.modules |= dict.fromkeys({JUDGES!r})

def world():
    root = logging.getLogger()
    return dict(os.environ), os.listdir(), root.level, list(root.handlers), dict(jax.config.values)

import jax
import jax.experimental.pallas.mosaic_gpu  # sets MOSAIC_GPU_… in the environment: jax's doing
before = world()
for name in {modules!r}:
    importlib.import_module(name)
assert before == world(), "importing changed the environment, the folder, the root logger or jax's settings"
from jax._src import xla_bridge
assert not xla_bridge._backends, "importing started a jax backend"
"""
    done = _run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "program, flag",
    [
        ("train", "--learning_rate"),
        ("rl.train", "--num_generations"),
        ("export.__main__", "--imatrix"),
        ("chat", "--temperature"),
        ("evaluate.__main__", "--few_shot"),
        ("evaluate.reading.__main__", "--instruction"),
    ],
)
def test_help_is_quick_and_needs_no_jax(program, flag):
    code = f"""
import sys
from jaxtune.{program} import main
try:
    main(["--help"])
except SystemExit as stop:
    assert stop.code == 0
slow = {{"jax", "flax", "transformers", "datasets", "matplotlib"}} & set(sys.modules)
assert not slow, slow
"""
    done = _run(code)
    assert done.returncode == 0, done.stderr
    assert flag in done.stdout
