"""Evaluation of reading: what models write of images, against what stands there.

    from jaxtune.evaluate.reading import error_rates, read_images

    said = read_images(model, processor, examples("test.jsonl", "Write out the text."))
    error_rates([one.reference for one in examples], said).cer

`python -m jaxtune.evaluate.reading` imports this before its --help, so each name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtune.evaluate.reading.metrics import ErrorRates, error_rates
    from jaxtune.evaluate.reading.run import Example, examples, read_images

_HOMES = {
    "ErrorRates": "metrics",
    "Example": "run",
    "error_rates": "metrics",
    "examples": "run",
    "read_images": "run",
}

__all__ = ["ErrorRates", "Example", "error_rates", "examples", "read_images"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"jaxtune.evaluate.reading has no {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"jaxtune.evaluate.reading.{_HOMES[name]}"), name)
