"""scripts/bench/measuring.py: a machine's ceilings come from a process of their own."""

import subprocess
import sys

import pytest


@pytest.fixture
def measuring(bench_module):
    return bench_module("measuring")


def test_there_are_none_without_a_gpu(measuring, monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert measuring.ceilings_here() is None and capsys.readouterr().out == ""


def test_what_the_process_fails_by_is_shown(measuring, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "abacus")
    with pytest.raises(RuntimeError, match=r"ceilings failed(.|\n)*abacus"):
        measuring.ceilings_here()


def test_its_last_line_is_taken_and_the_others_are_shown(measuring, monkeypatch, capsys, tmp_path):
    def run(command, env, **_):
        assert command[0] == sys.executable and env["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
        return subprocess.CompletedProcess(
            command, 0, 'the ceiling is o\n{"bandwidth": 3e12, "read": 4e12}\n'
        )

    monkeypatch.setattr(subprocess, "run", run)
    here = measuring.ceilings_here()
    assert (here.bandwidth, here.read, here.link) == (3e12, 4e12, measuring.roofline.H200.link)
    assert capsys.readouterr().out == "the ceiling is o\n"
    monkeypatch.setenv("JAXTUNE_BENCH_CEILINGS", str(tmp_path / "ceilings.json"))
    assert measuring.ceilings_here() == here
    monkeypatch.setattr(subprocess, "run", None)
    assert measuring.ceilings_here() == here and "ceilings as in" in capsys.readouterr().out


@pytest.mark.parametrize("eight", [False, True])
def test_products_are_measured_both_ways_where_they_fit(measuring, monkeypatch, eight):
    monkeypatch.setattr(
        measuring, "PRODUCTS", {"o": (32, 64, 48), "wide": (999, 999, 999), "head": (8, 64, 80)}
    )
    seen = []

    def call_seconds(call, x, w, queued):
        seen.append((call(x, w).shape, x.dtype.name, w.dtype.name))
        assert queued >= 1
        return [2e-3, 1e-3, 5e-3]

    monkeypatch.setattr(measuring, "call_seconds", call_seconds)
    rates = measuring.product_rates(eight, 1e5)
    names = ["o"] if eight else ["o", "head"]
    assert list(rates) == [f"{name} {way}" for name in names for way in ("forward", "back")]
    assert rates["o back"] == 2 * 32 * 64 * 48 / 2e-3
    left = ("float8_e4m3fn", "float8_e5m2") if eight else ("bfloat16", "bfloat16")
    assert seen[:2] == [((32, 48), left[0], left[0]), ((32, 64), left[1], left[0])]
    assert len(seen) == 3 * len(rates)
