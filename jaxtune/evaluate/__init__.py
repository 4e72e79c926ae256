"""Evaluation of reasoning: questions with answers, answered n times each and checked.

    from jaxtune.evaluate import EvaluateConfig, evaluate

    results = evaluate(model, "test.jsonl", EvaluateConfig(n=8, temperature=0.8))
    results.metrics["pass@8"]

`python -m jaxtune.evaluate` imports this before its --help, so each name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtune.evaluate.callback import EvaluateCallback
    from jaxtune.evaluate.config import EvaluateConfig
    from jaxtune.evaluate.results import Results
    from jaxtune.evaluate.run import evaluate

_HOMES = {"EvaluateCallback": "callback", "EvaluateConfig": "config", "Results": "results", "evaluate": "run"}

__all__ = ["EvaluateCallback", "EvaluateConfig", "Results", "evaluate"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"jaxtune.evaluate has no {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"jaxtune.evaluate.{_HOMES[name]}"), name)
