"""scripts/bench/kernels.py: its cases, traced for a GPU that is not there and without the memory of their shapes."""

import jax
import numpy as np
import pytest

from jaxtune.kernels import target


@pytest.fixture
def kernels(bench_module):
    return bench_module("kernels")


OURS_IN = (
    "shipped",
    "joined",
    "from the codes",
    "gated_mlp",
    "fp8",
)  # names of the cases that run a kernel of ours
KINDS = ("linear", "mlp", "matrix", "swiglu", "attention", "loss", "decode", "decode_attention")
PLAIN = {"shipped": "plain", "cuDNN": "plain", "joined": "two products", "fp8_gated_mlp": "three plain layers",
         "mlp: gated_mlp": "mlp: three plain layers"}  # fmt: skip


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
        for ours, plain in PLAIN.items():
            assert results[name] == results[name.replace(ours, plain)], name


def by_name(cases) -> dict:
    return {case.name: jax.jit(case.call)(*case.arguments) for case in cases}


def relative(got, want) -> float:
    got, want = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(x)]) for x in (got, want))
    got, want = got.astype(np.float32), want.astype(np.float32)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.fixture
def small(kernels, monkeypatch):
    for name, size in {"D": 128, "F": 256, "HEADS": 4, "KV": 2, "H": 16, "VOCAB": 1000}.items():
        monkeypatch.setattr(kernels, name, size)
    monkeypatch.setattr(kernels, "GROUPS", {"gate_up": (128, (256, 256)), "down": (256, (128,))})
    return kernels


def test_plain_versions_of_the_loss_say_the_same(small):
    found = by_name(small.loss_cases(64))
    pairs = {"loss, chunks of 512": "loss, plain, 64 rows"} | {
        name: f"{name}, plain, 64 rows" for name in ("log-probabilities", "log-probabilities, both ways")
    }
    for ours, plain in pairs.items():
        assert relative(found[ours], found[plain]) < 2e-2, ours


def test_the_plain_loss_takes_the_rows_that_fit(small, monkeypatch):
    monkeypatch.setattr(small, "room", lambda: 6 * 4 * 1000 * 20)
    cases = {case.name: case for case in small.loss_cases(64)}
    case = cases["loss, plain, 16 rows"]
    assert case.arguments[0].shape == (16, 128) and case.flops == cases["loss, chunks of 512"].flops / 4


@pytest.mark.parametrize(("ours", "error"), [("gated_mlp", 2e-2), ("fp8_gated_mlp", 0.2)])
def test_plain_layers_say_what_the_mlp_does(small, monkeypatch, ours, error):
    draw = small.random  # larger: silu of small numbers is half of them, and gate and up might be swapped
    monkeypatch.setattr(small, "random", lambda seed, *shape: 10 * draw(seed, *shape))
    found = by_name(small.mlp_cases(256))
    for end in ("", ", both ways"):
        assert relative(found[f"mlp: {ours}{end}"], found[f"mlp: three plain layers{end}"]) < error


def test_plain_attention_is_measured_where_its_scores_would_not_fit(small, monkeypatch):
    """They come in parts."""
    monkeypatch.setattr(small, "room", lambda: 1.0)
    names = [case.name for case in small.attention_cases(128)]
    ours = [name for name in names if "cuDNN" in name]
    assert (
        [name.replace("cuDNN", "plain") for name in ours] == [name for name in names if "plain" in name] != []
    )


def test_plain_attention_keeps_documents_apart(small):
    q, k, v = (small.random(i, 1, 64, heads, 16) for i, heads in enumerate((4, 2, 2)))
    packed = small.plain_attention(q, k, v, 4)
    alone = small.plain_attention(*(x.reshape(4, 16, *x.shape[2:]) for x in (q, k, v)), 1)
    assert relative(packed, alone) < 1e-2
