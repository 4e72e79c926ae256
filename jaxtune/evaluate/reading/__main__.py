"""`python -m jaxtune.evaluate.reading MODEL… --data …`: how well models read images, side by side.

Exit status: 0 done, 2 a setting, model or data set that cannot be used (one line).
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from jaxtune.evaluate.command import run_command

DESCRIPTION = """Let models read images, and tell word and character error rates, side by side.

An output folder of jaxtune.train stands for base, adapter and merged model; an adapter folder for base and adapter. The
rows are conversations with images that end with the assistant's answer, or, with --instruction, images with texts.

examples:
  python -m jaxtune.evaluate.reading outputs/ocr --data test.jsonl --instruction "Write out the text."
  python -m jaxtune.evaluate.reading Qwen/Qwen2.5-VL-3B-Instruct outputs/ocr/merged --data test.jsonl --limit 200"""


@dataclasses.dataclass(frozen=True)
class Reading:
    """One run of `python -m jaxtune.evaluate.reading`."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """Hugging Face folders or hub ids, adapter folders, output folders of jaxtune.train."""
    data: str
    """Images with what stands there: JSONL, JSON, CSV or Parquet file, or hub name."""
    output_dir: Path = Path("outputs/reading")
    """Folder for readings and results."""
    instruction: str | None = None
    """Question that rows of an image and a text are asked with."""
    image_folder: Path | None = None
    """Where relative paths of images are looked for besides the current folder. None = beside the data file."""
    dataset_config: str | None = None
    """Configuration (subset) of a hub dataset."""
    split: str = "test"
    """Split of a hub dataset."""
    limit: int | None = None
    """Read the first so many images only."""
    resize: str = "min"
    """As in training: min, max, or a number of pixels."""
    ignore_case: bool = False
    """Capitals do not matter."""
    max_new_tokens: int = 256
    """Tokens of a reading at most."""
    batch_size: int = 8
    """Rows read at a time."""
    max_seq_length: int | None = None
    """Tokens of prompt and reading at most. None = the model's own."""
    load_in_4bit: bool | None = None
    """Weights in NF4. None = for an adapter and its base, as QLoRA trains it, and for a 4-bit checkpoint; else 16 bits
    (CPU: 32)."""
    shown: int = 5
    """Readings to print; all are in the folder."""
    token: Annotated[str | None, tyro.conf.arg(metavar="TOKEN")] = dataclasses.field(default=None, repr=False)
    """Access token of the hub."""
    traceback: bool = False
    """Show where an error came from."""

    def __post_init__(self) -> None:
        for name in ("limit", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.models:
            raise ValueError("name at least one model")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one comparison; returns the exit status."""

    def work(settings: Reading, command: str) -> None:
        # Only now: --help and a mistyped setting should not wait for jax and transformers.
        from jaxtune.evaluate.reading.job import run

        run(settings, command)

    return run_command(
        "jaxtune.evaluate.reading",
        Reading,
        DESCRIPTION,
        work,
        arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
