"""One run of `python -m jaxtune.evaluate.reading`: each model in turn, one table, everything saved.

output_dir/
  results.json      error rates of each model, settings, versions
  readings.jsonl    of each row its reference, and each model's reading with its character error rate
  readings.md       the table, and the worst readings
"""

import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import jax
from rich.console import Console

from jaxtune import hub
from jaxtune.data.sources import load_dataset
from jaxtune.evaluate.reading.metrics import ErrorRates, error_rates
from jaxtune.evaluate.reading.run import Example, examples, read_images
from jaxtune.fast import FastVisionModel
from jaxtune.job import make_console, make_table

if TYPE_CHECKING:
    from jaxtune.evaluate.reading.__main__ import Reading

WORST = 20  # readings in readings.md


class Candidate(NamedTuple):
    """A model to compare. label: in the table. path: what is loaded. nf4: whether its weights are in NF4."""

    label: str
    path: str
    nf4: bool


def run(settings: "Reading", command: str) -> dict[str, ErrorRates]:
    """Reads, writes the folder and prints the table.

    Args:
        command: that was given, for results.json.

    Returns:
        label of a model -> its error rates.

    Raises:
        ValueError, TypeError, OSError: something that cannot be used; the message says why.
    """
    console = make_console()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    compared = [one for name in settings.models for one in candidates(name, settings)]
    asked = _examples(settings)
    references = [one.reference for one in asked]
    device = jax.devices()[0].device_kind
    console.print(
        f"[bold]jaxtune[/bold]: {len(asked)} images, {len(compared)} models on {device}", highlight=False
    )
    said: dict[str, list[str]] = {}
    for one in compared:
        said[one.label] = _read(one, asked, settings)
    rates = {
        label: error_rates(references, readings, ignore_case=settings.ignore_case)
        for label, readings in said.items()
    }
    save(settings, command, rates, references, said)
    tell(console, rates, references, said, settings)
    return rates


def candidates(name: str, settings: "Reading") -> list[Candidate]:
    """What a name on the command line stands for.

    Raises:
        OSError: no such model.
    """
    folder = Path(name).expanduser()
    if (folder / "train.yaml").is_file():
        parts = [folder / part for part in ("adapter", "merged", "model") if (folder / part).is_dir()]
        if not parts:
            raise ValueError(f"{name} has neither adapter nor model in it; the run has saved nothing yet")
        return [one for part in parts for one in candidates(str(part), settings)]
    checkpoint = hub.resolve(name, token=settings.token)
    own = settings.load_in_4bit
    if checkpoint.adapter is None:
        return [Candidate(name, name, checkpoint.kind == "bnb-4bit" if own is None else own)]
    nf4 = True if own is None else own
    base = checkpoint.name_or_path
    return [Candidate(f"base {Path(base).name}", base, nf4), Candidate(f"adapter {name}", name, nf4)]


def _examples(settings: "Reading") -> list[Example]:
    rows: Any = settings.data
    if not Path(rows).expanduser().exists():
        rows = load_dataset(rows, settings.split, subset=settings.dataset_config, token=settings.token)
    return examples(rows, settings.instruction, limit=settings.limit, image_folder=settings.image_folder)


def _read(one: Candidate, asked: Sequence[Example], settings: "Reading") -> list[str]:
    """The readings of one model, which is gone afterwards."""
    model, processor = FastVisionModel.from_pretrained(
        one.path, max_seq_length=settings.max_seq_length, load_in_4bit=one.nf4, token=settings.token
    )
    resize = int(settings.resize) if settings.resize.isdigit() else settings.resize
    readings = read_images(
        model.for_inference(),
        processor,
        asked,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        resize=resize,
        progress=sys.stderr.isatty(),
    )
    model.for_training()
    del model
    gc.collect()
    return readings


def save(
    settings: "Reading",
    command: str,
    rates: dict[str, ErrorRates],
    references: Sequence[str],
    said: dict[str, list[str]],
) -> None:
    """Writes the folder."""
    folder = settings.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()}
    plain.pop("token")
    about = {
        "models": {label: one._asdict() for label, one in rates.items()},
        "images": len(references),
        "command": command,
        "settings": plain,
        "versions": {"jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
    }
    (folder / "results.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", "utf-8")
    lines = []
    for row, reference in enumerate(references):
        own = {
            label: {
                "text": readings[row],
                "cer": error_rates([reference], [readings[row]], ignore_case=settings.ignore_case).cer,
            }
            for label, readings in said.items()
        }
        lines.append(
            json.dumps({"row": row, "reference": reference, "readings": own}, ensure_ascii=False) + "\n"
        )
    (folder / "readings.jsonl").write_text("".join(lines), "utf-8")
    (folder / "readings.md").write_text(markdown(rates, [json.loads(line) for line in lines]), "utf-8")


def markdown(rates: dict[str, ErrorRates], rows: Sequence[dict[str, Any]]) -> str:
    """The table of error rates, and the rows that the last model reads worst."""
    lines = ["| model | CER | WER | exact |", "|---|---|---|---|"]
    lines += [
        f"| {label} | {one.cer:.2%} | {one.wer:.2%} | {one.exact:.1%} |" for label, one in rates.items()
    ]
    last = list(rates)[-1]
    worst = sorted(rows, key=lambda row: -row["readings"][last]["cer"])[:WORST]
    lines += ["", f"Worst of {last}:", "", "| row | CER | stands there | read |", "|---|---|---|---|"]
    for row in worst:
        own = row["readings"][last]
        cells = [" ".join(text.split()).replace("|", "\\|") for text in (row["reference"], own["text"])]
        lines.append(f"| {row['row']} | {own['cer']:.0%} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def tell(
    console: Console,
    rates: dict[str, ErrorRates],
    references: Sequence[str],
    said: dict[str, list[str]],
    settings: "Reading",
) -> None:
    """Prints error rates, some readings, and where everything is."""
    table = make_table(f"{len(references)} images", "CER", "WER", "exact")
    for label, one in rates.items():
        table.add_row(label, f"[bold]{one.cer:.2%}[/bold]", f"{one.wer:.2%}", f"{one.exact:.1%}")
    console.print(table)
    readings = make_table("stands there", *said)
    for row in range(min(settings.shown, len(references))):
        readings.add_row(references[row], *(texts[row] for texts in said.values()))
    if settings.shown:
        console.print(readings, markup=False)
    console.print(f"readings and results: {settings.output_dir}", highlight=False)
