"""scripts/bench/step.py checks its arguments, and knows what to try where a batch does not fit."""

import json

import jax
import numpy as np
import pytest


@pytest.fixture
def step(bench_module):
    return bench_module("step")


def test_rows_are_halved_then_tokens(step):
    tried = [(6, 1100)]
    while less := step.smaller(*tried[-1]):
        tried.append(less)
    assert tried == [(6, 1100), (3, 1100), (1, 1100), (1, 550), (1, 275)]
    assert step.smaller(1, 2048, least=2000) is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--batch 4x2048 8", "--batch 8: expected ROWSxTOKENS"),
        ("--batch 0x2048", "expected ROWSxTOKENS"),
        ("--batch 1x8 --documents 9", "--documents 9 do not fit into the rows of --batch 1x8"),
        ("--remat atention", "'atention' is unknown"),
        ("--remat none auto --compile_for h200", "auto asks a device"),
        ("--layout 2x --devices 2", "--layout 2x: expected data, fsdp, or"),
        ("--layout data 2x4 --devices 4", "--layout 2x4 is not --devices 4"),
        ("--compile_for h200 --profile", "leave one out"),
        ("--compile_for p100", "invalid choice: 'p100'"),
        ("--plain linear+mpl", "--plain linear+mpl: expected some of linear, mlp, joined by +"),
        ("--plain linear --compute_dtype fp8", "linear layers in fp8 have no plain version"),
        ("--plain mlp --remat none auto", "name it in place of --remat auto"),
        ("--steps 0", "--steps: invalid positive value"),
    ],
)
def test_arguments_are_checked_when_they_are_read(step, capsys, words, says):
    with pytest.raises(SystemExit) as stopped:
        step.arguments(words.split())
    assert stopped.value.code == 2 and says in capsys.readouterr().err


def test_good_arguments_pass(step):
    args = step.arguments("--batch 4x2048 1x8192 --remat auto all+offload --devices 8 --layout 2x4".split())
    assert args.remat == ["auto", "all+offload"]


def test_chunks_of_the_loss_are_those_of_the_machine_traced_for(step):
    from jaxtune.kernels import target

    assert step.loss_chunks("2x1024") == 8
    with target.tracing_for((9, 0)):
        assert [step.loss_chunks(name) for name in ("1x256", "2x1024", "4x2048", "3x2000")] == [1, 4, 8, 8]


def test_plain_parts_are_traced_beside_the_shipped_ones(step):
    """A layer's q, k, v and o, then its MLP; what jit keeps of one design must not reach the next."""
    from jaxtune.kernels import target
    from jaxtune.models.remat import Remat
    from jaxtune.step import make_train_step

    bench = step.Bench(step.arguments(["--model", "tiny"]))
    call = bench.trainable, bench.state, bench.base, bench.batch(1, 512), jax.random.key(0)

    def program(design):
        with target.tracing_for((9, 0)), step.plain.plain(design):
            made = make_train_step(bench.model, bench.optimizer, remat=Remat.parse("none"))
            text = str(made.trace(*call).jaxpr)
        return text.count("dot_general"), text.count("swiglu")

    (products, swiglu), linear, mlp, both, again = map(program, ("", "linear", "mlp", "linear+mlp", ""))
    assert again == (products, swiglu) and swiglu > 0
    assert linear[0] > products and linear[1] == swiglu and mlp[1] == both[1] == 0
    # without the MLP of one operation gate, up and down are among the layers that `linear` changes
    assert both[0] - mlp[0] > linear[0] - products


@pytest.mark.parametrize(("timed", "ran"), [(1, 2), (2, 3), (10, 12)])
def test_steps_are_timed_after_one_or_two_others(step, monkeypatch, timed, ran):
    class Bench:
        args = step.arguments(["--steps", str(timed)])
        trainable = state = base = None

    calls = iter(range(100))

    def compiled(trainable, state, base, batch, key):
        return trainable, state, {"loss": next(calls)}

    monkeypatch.setattr(step.measuring, "peak_gb", lambda: next(calls) / 2)
    result = step.Result("1x8", "none", "data", 1, 1.0, 2.0, 0.0, {})
    step.run(Bench, result, compiled, {"input_ids": np.zeros((1, 1, 8))})
    assert (result.before_gb, result.loss, result.peak_gb) == (0, ran, (ran + 1) / 2)  # in this order
    assert "(0.00 before)" in result.line() and result.spread_ms[0] <= result.median_ms <= result.spread_ms[1]


def test_each_result_is_kept(step, tmp_path):
    results = []
    for name in ("1x256", "1x512"):
        results.append(step.Result(name, "none", "data", 1, 1.0, 2.0, 0.0, {}, scaled_from="4x512"))
        assert results[-1].line().endswith("scaled to memory from 4x512")
        step.report(results, str(tmp_path))
        assert [row["batch"] for row in json.loads((tmp_path / "step.json").read_text())][-1] == name
    assert len(list(tmp_path.iterdir())) == 1


def test_a_batch_that_does_not_fit_is_tried_smaller(step, monkeypatch, capsys):
    tried = []

    def attempt(bench, name, remat):
        tried.append(name)
        if name == "1x512":
            return step.Result(name, remat, "data", 1, 1.0, 2.0, 0.0, {})
        return MemoryError("too little") if bench.full else RuntimeError("INTERNAL: no")

    monkeypatch.setattr(step, "attempt", attempt)

    class Bench:
        args, full = step.arguments([]), True

    found = step.scaled(Bench, "2x1024", "none")
    assert tried == ["2x1024", "1x1024", "1x512"] and found.scaled_from == "2x1024"
    assert "does not fit: too little; again with 1x1024" in capsys.readouterr().out
    assert step.scaled(Bench, "1x512", "none").scaled_from is None
    assert step.scaled(Bench, "1x384", "none") is None  # 192 tokens are too few
    Bench.full = False
    tried.clear()
    assert step.scaled(Bench, "2x1024", "none") is None and tried == ["2x1024"]
