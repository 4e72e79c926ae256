"""scripts/bench/kernels.py: its cases, traced for a GPU that is not there and without the memory of their shapes."""

import importlib
import sys
from pathlib import Path

import jax
import pytest

from jaxtune.kernels import target

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"
OURS = ("kernels", "measuring", "overlap", "roofline")


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    for name in OURS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("kernels")
    for name in OURS:
        sys.modules.pop(name, None)


OURS_IN = ("shipped", "joined", "from the codes")  # names of the cases that run a kernel of ours
KINDS = ("linear", "matrix", "swiglu", "attention", "loss", "decode", "decode_attention")


def without_arrays(make):
    """The cases that `make` yields, with shapes for arguments."""
    cases = []

    def arguments():
        cases.extend(make())
        return [case.arguments for case in cases]

    shapes = jax.eval_shape(arguments)
    return [case._replace(arguments=given) for case, given in zip(cases, shapes, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_case_is_lowered_for_hopper(kernels, monkeypatch, kind):
    assert set(kernels.CASES) == set(KINDS)
    monkeypatch.setattr(kernels, "ROTATING", 1)  # one set of weights
    rows = 8 if kind.startswith("decode") else 8192
    with target.tracing_for((9, 0)):
        cases = without_arrays(lambda: kernels.CASES[kind](rows))
        lowered = [jax.jit(c.call).trace(*c.arguments).lower(lowering_platforms=("cuda",)) for c in cases]
    results = {}
    for case, program in zip(cases, lowered, strict=True):
        assert ("mosaic_gpu" in program.as_text()) == any(word in case.name for word in OURS_IN), case.name
        results[case.name] = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), program.out_info)
    for name in results:
        assert results[name] == results[name.replace("shipped", "plain")], name
