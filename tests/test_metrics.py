"""What a run tells: windows, history, reporters, the bar, the loss curve."""

import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from jaxtune.config import SFTConfig
from jaxtune.metrics import (
    History,
    Progress,
    Speed,
    TrainerState,
    peak_memory_gib,
    plot_curves,
    read_history,
)

HISTORY = [
    {"loss": 2.5, "step": 10, "learning_rate": 1e-4},
    {"eval_loss": 2.25, "step": 10},
    {"loss": 1.5, "step": 20},
    {"eval_loss": 1.75, "step": 20},
    {"train_loss": 2.0, "step": 20},
]


def test_window_holds_every_figure_since_the_last_log():
    state = TrainerState()
    for loss in (1.0, 2.0, 6.0):
        state.add({"loss": loss, "grad_norm": loss * 2, "kl": np.asarray([loss, -loss])})
    assert state.total_loss == 9.0
    assert state.close_window() == {
        "loss": [1.0, 2.0, 6.0],
        "grad_norm": [2.0, 4.0, 12.0],
        "kl": [1.0, -1.0, 2.0, -2.0, 6.0, -6.0],
    }
    state.record({"reward": 0.5})
    assert (state.close_window(), state.window, state.total_loss) == ({"reward": [0.5]}, {}, 9.0)


def test_speed_leaves_pauses_out(monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 12.0, 12.0, 20.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    speed = Speed()  # at 0
    speed.pause()  # at 2
    speed.resume()  # at 10
    speed.add(400)
    assert speed.per_second() == 100  # at 12: 4 seconds
    speed.restart()  # at 12
    speed.add(8)
    assert speed.per_second() == 1  # at 20


def test_peak_memory(monkeypatch):
    assert 0.05 < peak_memory_gib() < 100
    device = SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 3 * 2**30})
    monkeypatch.setattr("jax.local_devices", lambda: [device])
    assert peak_memory_gib() == 3


def test_history_is_written_at_once_and_rewritten_on_resume(tmp_path):
    args = SFTConfig(str(tmp_path / "new"))
    history = History(args)
    for record in HISTORY:
        history.log(record)
        assert read_history(history.path)[-1] == record
    assert read_history(history.path) == HISTORY
    History(args, HISTORY[:2])
    assert read_history(history.path) == HISTORY[:2]
    assert [entry.name for entry in history.path.parent.iterdir()] == ["history.jsonl"]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    history = History(SFTConfig(str(tmp_path), report_to="tensorboard"))
    history.log({"loss": 2.5, "step": 10, "note": "text"})
    history.log({"eval_loss": 2.25, "train_runtime": 3, "step": 20})
    history.close()
    [path] = (tmp_path / "runs").iterdir()
    events, raw = [], path.read_bytes()
    while raw:  # length, its checksum, the event, its checksum
        (length,) = struct.unpack("<Q", raw[:8])
        events.append(Event.FromString(raw[12 : 12 + length]))
        raw = raw[16 + length :]
    scalars = {(v.tag, e.step): v.simple_value for e in events for v in e.summary.value}
    assert scalars == {
        ("train/loss", 10): 2.5,
        ("train/step", 10): 10,
        ("eval/loss", 20): 2.25,
        ("train/runtime", 20): 3,
        ("train/step", 20): 20,
    }


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_run_trackers(tmp_path, monkeypatch, package):
    calls = []
    module = SimpleNamespace(
        init=lambda **keywords: calls.append(("init", keywords)),
        log=lambda record, step: calls.append(("log", record, step)),
        finish=lambda: calls.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, package, module)
    monkeypatch.setenv(f"{package.upper()}_PROJECT", "mine")
    history = History(SFTConfig(str(tmp_path / "run7"), report_to=[package], learning_rate=1.0))
    history.log({"loss": 2.5, "step": 10})
    history.close()
    (_, keywords), log, finish = calls
    assert (keywords["project"], keywords["name"], keywords["config"]["learning_rate"]) == (
        "mine",
        "run7",
        1.0,
    )
    assert log == ("log", {"train/loss": 2.5, "train/step": 10}, 10)
    assert finish == ("finish",)


@pytest.mark.parametrize(("reporter", "package"), [("wandb", "wandb"), ("tensorboard", "tensorboardX")])
def test_missing_reporter_says_what_to_install(tmp_path, monkeypatch, reporter, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ImportError, match=f"report_to='{reporter}' needs the package {package}: pip install {package}"
    ):
        History(SFTConfig(str(tmp_path), report_to=reporter))


def test_progress_prints_lines_without_a_terminal(capsys):
    progress = Progress(SFTConfig(disable_tqdm=True), done=3, total=2000)
    progress.step({"loss": 1.0}, 1e-4, 10.0, 0.5)
    progress.log({"loss": 1.23456, "num_tokens": 12345, "tokens_per_second": 123456.7, "step": 10})
    progress.close()
    captured = capsys.readouterr()
    assert captured.out == "step 10/2000: loss 1.235, num_tokens 12,345, tokens_per_second 123,457\n"
    assert captured.err == ""


def test_progress_shows_loss_rate_speed_and_memory_in_the_bar(capsys):
    progress = Progress(SFTConfig(disable_tqdm=False), done=3, total=20)
    progress.step({"reward": 0.5, "loss": 1.23456}, 2e-4, 12345.6, 0.5)
    progress.log({"loss": 1.0, "step": 10})
    progress.log({"eval_loss": 2.0, "step": 10})
    progress.close()
    captured = capsys.readouterr()
    assert "4/20" in captured.err
    assert "reward 0.5000, loss 1.2346, lr 2.00e-04, 12,346 tok/s, 0.50 GiB" in captured.err
    assert captured.out == "step 10/20: eval_loss 2\n"


def test_loss_curve(tmp_path):
    import matplotlib

    backend = matplotlib.get_backend(auto_select=False)
    path = plot_curves(HISTORY, tmp_path / "loss.png", "a model")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert matplotlib.get_backend(auto_select=False) == backend
    assert plot_curves([{"eval_loss": float("nan"), "step": 1}], tmp_path / "no.png") is None
    assert not (tmp_path / "no.png").exists()
