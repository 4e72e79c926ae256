"""scripts/bench/power.py reads what nvidia-smi prints until it is stopped."""

import time

import pytest


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A stand-in that prints these lines and then waits, as the real one does."""

    def install(*lines: str) -> None:
        script = tmp_path / "nvidia-smi"
        printed = "\n".join(lines)
        asked = tmp_path / "asked"
        script.write_text(
            f"#!/bin/sh\nprintf '{printed}'\necho \"$@\" > {asked}.part\nmv {asked}.part {asked}\nexec sleep 60\n"
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")

    return install


def wait(path) -> None:
    """Until the stand-in has printed, which it does first."""
    for _ in range(3000):
        if path.exists():
            return
        time.sleep(0.01)


def test_means_of_the_first_visible_gpu(bench_module, nvidia_smi, tmp_path):
    power = bench_module("power")
    nvidia_smi(*3 * ["690.00, 700.00, 1400, Active"], "610.00, 700.00, 1980, Not Active", "640.0, 7")
    with power.drawn() as found:
        wait(tmp_path / "asked")
        assert not found
    assert found == [power.Draw(670.0, 700.0, 1545.0, 0.75)]
    assert found[0].said() == "670 of 700 W at 1545 MHz, capped 75%"
    assert (tmp_path / "asked").read_text().split()[-2:] == ["-i", "3"]


@pytest.mark.parametrize("line", ["Field is not a valid field to query.", "[N/A], 700.00, 1400, Active"])
def test_a_card_that_does_not_say_it_gives_none(bench_module, nvidia_smi, tmp_path, line):
    power = bench_module("power")
    nvidia_smi(line)
    with power.drawn() as found:
        wait(tmp_path / "asked")
    assert not found


def test_a_machine_without_a_gpu_gives_none(bench_module, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with bench_module("power").drawn() as found:
        pass
    assert not found
