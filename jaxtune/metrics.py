"""What a run tells: its state, history.jsonl, TensorBoard / wandb / trackio, the bar, the loss curve."""

import dataclasses
import importlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import jax
import numpy as np

from jaxtune.config import TrainingConfig

GIB = 2**30
Record = dict[str, Any]


@dataclasses.dataclass
class TrainerState:
    """Where a run stands (Hugging Face's names). A checkpoint keeps all of it, so logs resume exactly."""

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    num_input_tokens_seen: int = 0
    log_history: list[Record] = dataclasses.field(default_factory=list)
    total_loss: float = 0.0
    window: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Count one optimizer step: numbers, or arrays of one number a micro-batch."""
        self.total_loss += metrics["loss"]
        self.record(metrics)

    def record(self, metrics: Mapping[str, Any]) -> None:
        """Keep figures for the next log."""
        for name, value in metrics.items():
            self.window.setdefault(name, []).extend(np.ravel(value).tolist())

    def close_window(self) -> dict[str, list[float]]:
        """Every figure since the last log; start anew."""
        window, self.window = self.window, {}
        return window


def mean(values: Iterable[float]) -> float | None:
    """Of what is not NaN; None where nothing is left (TRL's rule, and JSON's)."""
    valid = [value for value in values if not math.isnan(value)]
    return sum(valid) / len(valid) if valid else None


class Speed:
    """Tokens per second of training time; evaluation and saving are taken out by `pause`."""

    def __init__(self) -> None:
        self._tokens = 0
        self._since = time.perf_counter()
        self._paused: float | None = None

    def add(self, tokens: int) -> None:
        self._tokens += tokens

    def pause(self) -> None:
        self._paused = time.perf_counter()

    def resume(self) -> None:
        if self._paused is not None:
            self._since += time.perf_counter() - self._paused
            self._paused = None

    def per_second(self) -> float:
        return self._tokens / max(time.perf_counter() - self._since, 1e-9)

    def restart(self) -> None:
        self._tokens, self._since = 0, time.perf_counter()


def peak_memory_gib() -> float:
    """Most memory used so far in GiB: of the first device where it tells, else of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB  # Linux counts in KiB


class Reporter(Protocol):
    """A place that log records go to."""

    def log(self, record: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class History:
    """output_dir/history.jsonl (one record a line) and the reporters that report_to names."""

    def __init__(self, args: TrainingConfig, past: Iterable[Record] = (), *, writes: bool = True) -> None:
        """Rewrite history.jsonl with the records before this run (those of the checkpoint it resumes).

        writes: False in all processes of a run but one.
        """
        self._writes = writes
        self._reporters: list[Reporter] = []
        if not writes:
            return
        self.path = Path(args.output_dir) / "history.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".jsonl.tmp")
        temporary.write_text("".join(_line(record) for record in past), encoding="utf-8")
        os.replace(temporary, self.path)
        self._reporters = [_REPORTERS[name](args) for name in args.report_to]

    def log(self, record: Record) -> None:
        """Append a record; it holds "step"."""
        if not self._writes:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))
        numbers = {_grouped(name): value for name, value in record.items() if isinstance(value, (int, float))}
        for reporter in self._reporters:
            reporter.log(numbers, record["step"])

    def close(self) -> None:
        for reporter in self._reporters:
            reporter.close()


def read_history(path: str | Path) -> list[Record]:
    """The records of a history.jsonl."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"


def _grouped(name: str) -> str:
    """eval_loss -> eval/loss, loss -> train/loss, as Hugging Face's integrations name them."""
    prefix, _, rest = name.partition("_")
    return f"{prefix}/{rest}" if prefix in ("eval", "train") and rest else f"train/{name}"


class TensorBoard:
    """Event files in logging_dir (output_dir/runs by default), written by tensorboardX."""

    def __init__(self, args: TrainingConfig) -> None:
        module = _optional("tensorboardX", "tensorboard")
        self._writer = module.SummaryWriter(args.logging_dir or os.path.join(args.output_dir, "runs"))

    def log(self, record: Mapping[str, float], step: int) -> None:
        for name, value in record.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class RunTracker:
    """wandb or trackio, which share one interface; project and login come from their own settings."""

    def __init__(self, package: str, args: TrainingConfig) -> None:
        self._module = _optional(package, package)
        self._module.init(
            project=os.environ.get(f"{package.upper()}_PROJECT", "jaxtune"),
            name=args.run_name or Path(args.output_dir).name,
            config=dataclasses.asdict(args),
        )

    def log(self, record: Mapping[str, float], step: int) -> None:
        self._module.log(dict(record), step=step)

    def close(self) -> None:
        self._module.finish()


_REPORTERS = {
    "tensorboard": TensorBoard,
    "wandb": lambda args: RunTracker("wandb", args),
    "trackio": lambda args: RunTracker("trackio", args),
}


def _optional(package: str, reporter: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"report_to={reporter!r} needs the package {package}: pip install {package} (or leave it out of "
            "report_to; history.jsonl is written always)"
        ) from error


class Progress:
    """A bar in terminals and notebooks; elsewhere, or with disable_tqdm=True, one printed line a log."""

    def __init__(self, args: TrainingConfig, done: int, total: int, *, speaks: bool = True) -> None:
        """speaks: False in all processes of a run but one."""
        from tqdm.auto import tqdm  # decides about notebooks when it is imported
        from tqdm.notebook import tqdm as notebook_bar

        seen = issubclass(tqdm, notebook_bar) or (
            sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
        )
        shown = speaks and (seen if args.disable_tqdm is None else not args.disable_tqdm)
        self._total, self._speaks = total, speaks
        self._bar = tqdm(
            total=total, initial=done, unit="step", desc="train", dynamic_ncols=True, disable=not shown
        )
        self._shown = shown

    def step(
        self,
        figures: Mapping[str, float],
        learning_rate: float,
        tokens_per_second: float,
        memory_gib: float,
    ) -> None:
        """One optimizer step is done; figures such as {"loss": 1.5} come first."""
        first = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self._bar.set_postfix_str(
            f"{first}, lr {learning_rate:.2e}, {tokens_per_second:,.0f} tok/s, {memory_gib:.2f} GiB",
            refresh=False,
        )
        self._bar.update()

    def log(self, record: Record) -> None:
        """Print a record where there is no bar; evaluations are printed always."""
        if self._shown and not any(name.startswith("eval") for name in record):
            return
        values = ", ".join(f"{name} {_short(value)}" for name, value in record.items() if name != "step")
        self.say(f"step {record['step']}/{self._total}: {values}")

    def say(self, text: str) -> None:
        """Print without breaking the bar."""
        if self._shown:
            self._bar.write(text)
        elif self._speaks:
            print(text, flush=True)

    def close(self) -> None:
        self._bar.close()


def _short(value: Any) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def plot_curves(
    history: Iterable[Record],
    path: str | Path,
    title: str = "",
    *,
    name: str = "loss",
    unit: str = "nats per token",
) -> Path | None:
    """Draw a figure of training and of evaluation over the steps into a PNG; None where there is nothing to draw."""
    from matplotlib.backends.backend_agg import (
        FigureCanvasAgg,
    )  # no pyplot: the user's backend stays as it is
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    records = list(history)
    evaluations = sorted(
        {key for r in records for key in r if key.startswith("eval") and key.endswith(f"_{name}")}
    )
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key in [name, *evaluations]:
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None and math.isfinite(r[key])]
        if points:
            label = {name: "training", f"eval_{name}": "evaluation"}.get(key, key)
            marker = "o" if key != name or len(points) == 1 else ""
            axes.plot(*zip(*points, strict=True), marker=marker, markersize=5, label=label)
    if not axes.lines:
        return None
    axes.set(xlabel="optimizer step", ylabel=f"{name} ({unit})", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return Path(path)
