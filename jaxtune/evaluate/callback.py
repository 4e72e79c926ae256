"""Evaluation while a model is trained."""

import json
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from jaxtune.data.sources import Source
from jaxtune.evaluate.config import EvaluateConfig
from jaxtune.evaluate.results import Results
from jaxtune.evaluate.run import Plan, carry_out, plan


class EvaluateCallback:
    """Evaluates the model every so many steps: `GRPOTrainer(…, callbacks=[EvaluateCallback(rows, every=50)])`.

    Each time it prints the metrics in a line, and adds one to output_dir/evaluation.jsonl.

    Args:
        rows, config, options: as for `evaluate`.
        every: optimizer steps.

    Attributes:
        results: (step, Results) of each time.
    """

    def __init__(self, rows: Source, config: EvaluateConfig | None = None, *, every: int, **options: Any):
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        self.results: list[tuple[int, Results]] = []
        self._rows, self._config, self._every = rows, config or EvaluateConfig(), every
        self._options = options
        self._plan: Plan | None = None

    def on_step_end(self, trainer: Any, metrics: Any) -> None:
        """Called by the trainer after each step."""
        step = trainer.state.global_step
        if step % self._every:
            return
        if self._plan is None:
            self._plan = plan(trainer.model, self._rows, self._config, **self._options)
        results = carry_out(trainer.model, self._plan, progress=False)
        self.results.append((step, results))
        record = {"step": step} | {name: one.value for name, one in results.metrics.items()}
        with (Path(trainer.args.output_dir) / "evaluation.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        said = ", ".join(f"{name} {one.value:.1%}" for name, one in results.metrics.items())
        tqdm.write(f"step {step}: {said} of {len(results.judged)} questions")
