"""One run of `python -m jaxtune.train`: load, look at the model before, train, look again, save, tell.

prepare(job) -> Prepared    everything that bad settings, models or data can break
train(prepared)             the rest
"""

import dataclasses
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import jax
from rich import box
from rich.console import Console
from rich.table import Table

from jaxtune import cluster
from jaxtune.command_line import BaseJob, Job
from jaxtune.config import LORA_TARGETS
from jaxtune.data import (
    VisionDataCollator,
    get_chat_template,
    has_images,
    load_dataset,
    standardize_sharegpt,
    train_on_responses_only,
)
from jaxtune.data.image_rows import IMAGE_COLUMNS
from jaxtune.data.image_sources import plain_images
from jaxtune.data.responses import text_tokenizer
from jaxtune.fast import FastLanguageModel
from jaxtune.model import Model
from jaxtune.tasks import orders, scoring
from jaxtune.trainer import SFTTrainer

SETTINGS_FILE = "train.yaml"
MAX_ANSWER = 28  # tokens; the longest answer of the shipped task has 26


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A job with its model and data loaded."""

    job: Job
    model: Model
    trainer: SFTTrainer
    console: Console
    started: float  # time.perf_counter()

    @property
    def is_shipped_task(self) -> bool:
        return self.job.data.dataset is None


@dataclasses.dataclass(frozen=True)
class Look:
    """What a model does at one moment: held-out loss, and on the shipped task its exact matches and two answers."""

    loss: float | None = None
    exact_match: float | None = None
    answers: tuple[str, ...] = ()


def make_console() -> Console:
    """Colours and the terminal's width on a terminal; plain text, 110 columns wide, elsewhere. Of several processes the
    first speaks."""
    quiet = not cluster.is_first()
    return Console(quiet=quiet) if sys.stdout.isatty() else Console(width=110, quiet=quiet)


def prepare(job: Job) -> Prepared:
    """Load the model and prepare the data.

    Raises:
        ValueError, TypeError, OSError: a setting, model or dataset that cannot be used; the message says why.
    """
    started, console = time.perf_counter(), make_console()
    model, tokenizer = load_model(job, console)
    train_rows, held_out = load_rows(job)
    trainer = SFTTrainer(
        model=model,
        args=job.training,
        data_collator=vision_collator(job, model, model.processor, train_rows),
        train_dataset=train_rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    if job.data.train_on_responses_only:
        trainer = train_on_responses_only(
            trainer, instruction_part=job.data.instruction_part, response_part=job.data.response_part
        )
    return Prepared(job, model, trainer, console, started)


def load_model(job: BaseJob, console: Console) -> tuple[Model, Any]:
    """The base with a fresh adapter (or the one of an adapter folder, or none in full fine-tuning), and tokenizer; says
    on what."""
    kind, count, processes = jax.devices()[0].device_kind, jax.device_count(), jax.process_count()
    hosts = f", {processes} processes" if processes > 1 else ""
    console.print(f"[bold]jaxtune[/bold]: {job.model.model_name} on {kind} ({count}{hosts})")
    model, tokenizer = FastLanguageModel.from_pretrained(**dataclasses.asdict(job.model))
    if count > 1:
        console.print(f"trains on {model.layout}", highlight=False)
    tokenizer = with_chat_template(tokenizer, job)
    if model.lora is None and not job.model.full_finetuning:
        fields = dataclasses.asdict(job.lora)
        fields["target_modules"] = targets(job, sees=model.processor is not None)
        model = FastLanguageModel.get_peft_model(model, **fields)
    return model, tokenizer


def targets(job: BaseJob, *, sees: bool) -> Any:
    """The job's target_modules; of a model that takes images the default is every layer of its parts (None)."""
    return None if sees and job.lora.target_modules == LORA_TARGETS else job.lora.target_modules


def vision_collator(
    job: Job, model: Any, processor: Any, rows: datasets.Dataset
) -> VisionDataCollator | None:
    """The collator of rows with images, as the job asks for it; None for rows without, or a model that takes none.

    Args:
        model: has config and dtype.

    Raises:
        ValueError: the job has an instruction, and the rows no images.
    """
    data, source = job.data, Path(job.data.dataset or "").expanduser()
    if processor is None or not any(map(has_images, plain_images(rows))):
        if data.image_instruction is not None:
            raise ValueError(
                f"image_instruction is the question about a row's image; this dataset has the columns "
                f"{', '.join(rows.column_names)}, none of them {' or '.join(IMAGE_COLUMNS)}, or the model takes no "
                "images"
            )
        return None
    folder = data.image_folder or (source.absolute().parent if source.is_file() else None)
    return VisionDataCollator(
        model,
        processor,
        resize=int(data.resize) if data.resize.isdigit() else data.resize,
        completion_only_loss=job.training.completion_only_loss is not False,
        too_long=data.too_long,
        image_folder=folder,
        instruction=data.image_instruction,
    )


def with_chat_template(tokenizer: Any, job: BaseJob) -> Any:
    """The tokenizer with the chat template that the job asks for, or its own."""
    if job.data.chat_template is None:
        return tokenizer
    if text_tokenizer(tokenizer) is not tokenizer:
        raise ValueError(
            "chat_template: a model that takes images has its own, which says where they stand; leave it out"
        )
    return get_chat_template(tokenizer, job.data.chat_template, system_message=job.data.system_message)


def load_rows(job: Job) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """(rows to train on, held-out rows or None)."""
    data = job.data
    if data.dataset is None:
        train, held_out = (
            orders.make_rows(orders.NUM_TRAIN),
            orders.make_rows(orders.NUM_HELD_OUT, held_out=True),
        )
        return datasets.Dataset.from_list(train), datasets.Dataset.from_list(held_out)

    def load(name: str, split: str) -> datasets.Dataset:
        rows = load_dataset(name, split, subset=data.dataset_config, token=job.model.token)
        sharegpt = data.standardize_sharegpt and "conversations" in rows.column_names
        return standardize_sharegpt(rows) if sharegpt else rows

    train = load(data.dataset, data.split)
    if data.eval_dataset is None and data.eval_split is None:
        return train, None
    return train, load(data.eval_dataset or data.dataset, data.eval_split or data.split)


def train(prepared: Prepared) -> None:
    """Train, save, and print what changed and where everything is."""
    job, console = prepared.job, prepared.console
    output = Path(job.training.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    if cluster.is_first():
        (output / SETTINGS_FILE).write_text(job.to_yaml())
    console.print(_summary(prepared))
    before = look(prepared, "before training")
    prepared.trainer.train()
    after = look(prepared, "after training")
    adapter, merged = save(prepared)
    if after.loss is not None:
        console.print(_comparison(before, after))
    if after.answers:
        console.print(_answer_table(before, after))
    _print_whereabouts(prepared, adapter, merged)


def look(prepared: Prepared, when: str) -> Look:
    """Evaluate the model as it is now."""
    trainer, console = prepared.trainer, prepared.console
    if trainer.eval_dataset is None:
        return Look()
    loss = trainer.evaluate()["eval_loss"]
    console.print(f"{when}: held-out loss [bold]{loss:.4f}[/bold]", highlight=False)
    if not prepared.is_shipped_task:
        return Look(loss)
    rows = orders.make_rows(orders.NUM_HELD_OUT, held_out=True)
    expected = [row["completion"][0]["content"] for row in rows]
    given = scoring.answers(prepared.model, [row["prompt"] for row in rows], max_new_tokens=MAX_ANSWER)
    match = scoring.accuracy(given, expected, orders.exact_match)
    console.print(
        f"{when}: exact match [bold]{match:.1%}[/bold] of {len(rows)} held-out rows", highlight=False
    )
    return Look(loss, match, tuple(given[i] for i in orders.SHOWN))


def save(prepared: Prepared) -> tuple[Path, Path | None]:
    """Write adapter and merged model (with full fine-tuning the model only); (adapter or model, merged or None)."""
    model, tokenizer = prepared.model.on_one_device(), prepared.trainer.processing_class
    output = Path(prepared.job.training.output_dir)
    if model.lora is None:
        prepared.trainer.save_model(str(output / "model"))
        return output / "model", None
    prepared.trainer.save_model(str(output / "adapter"))
    if cluster.is_first():
        model.save_pretrained_merged(str(output / "merged"), tokenizer, progress=sys.stderr.isatty())
    cluster.wait_for_all("saved")
    return output / "adapter", output / "merged"


def _summary(prepared: Prepared) -> Table:
    model, trainer, training = prepared.model, prepared.trainer, prepared.job.training
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]] if trainer.train_dataset else []
    table = make_table("", "")
    table.add_row("parameters", f"{model.num_parameters():,}, of which trained {model.num_trainable():,}")
    on_each = " on each device" if model.layout.size > 1 else ""
    table.add_row("model in memory", f"{model.memory_bytes() / 2**20:,.0f} MiB{on_each}")
    table.add_row("training data", f"{len(lengths):,} rows, {sum(lengths):,} tokens")
    if training.max_steps > 0:
        rows = training.batch_shape(model.layout.size)[2]
        kind = "packed rows" if training.packing else "rows"
        table.add_row(
            "steps", f"{training.max_steps:,}, each {rows} {kind} of at most {training.max_length} tokens"
        )
    if trainer.eval_dataset is not None:
        table.add_row("held-out data", f"{len(trainer.eval_dataset):,} rows")
    table.add_row("settings", str(Path(training.output_dir) / SETTINGS_FILE))
    return table


def _comparison(before: Look, after: Look) -> Table:
    table = make_table("held-out rows", "before", "after")
    table.add_row("loss (nats per token)", f"{before.loss:.4f}", f"[bold]{after.loss:.4f}[/bold]")
    if after.exact_match is not None and before.exact_match is not None:
        table.add_row("exact match", f"{before.exact_match:.1%}", f"[bold]{after.exact_match:.1%}[/bold]")
    return table


def _answer_table(before: Look, after: Look) -> Table:
    rows = orders.make_rows(orders.NUM_HELD_OUT, held_out=True)
    table = make_table("", "")
    for n, i in enumerate(orders.SHOWN):
        table.add_row("prompt", f"[bold]{rows[i]['prompt'][-1]['content']}[/bold]")
        table.add_row("before", " ".join(before.answers[n].split()))
        table.add_row("after", f"[green]{after.answers[n]}[/green]")
        table.add_section()
    return table


def make_table(*headers: str) -> Table:
    """A plain table that folds long cells; without headers when all are empty."""
    table = Table(box=box.SIMPLE, show_header=any(headers), pad_edge=False)
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def _print_whereabouts(prepared: Prepared, adapter: Path, merged: Path | None) -> None:
    job, console = prepared.job, prepared.console
    output = Path(job.training.output_dir)
    python = _relative(sys.executable)
    lines = [("adapter (PEFT)" if merged else "model (transformers)", str(adapter))]
    if merged:
        lines.append(("merged model (transformers)", str(merged)))
    lines += [("loss curve and history", f"{output / 'loss.png'}, {output / 'history.jsonl'}")]
    table = make_table("", "")
    for what, where in lines:
        table.add_row(what, where)
    console.print(table)
    commands = make_table("", "")
    train_command = f"{python} -m jaxtune.train"
    model = shlex.quote(job.model.model_name)
    if jax.default_backend() == "cpu":
        commands.add_row("on a GPU", "bash scripts/quickstart.sh, on a host with an NVIDIA GPU")
    commands.add_row("another model", f"{train_command} --model_name Qwen/Qwen2.5-0.5B-Instruct")
    commands.add_row(
        "a dataset of the hub",
        f"{train_command} --model_name {model} --dataset trl-lib/Capybara --packing --learning_rate 2e-4",
    )
    export = f"{python} -m jaxtune.export {output} {output / 'gguf'} --method q4_k_m"
    commands.add_row("for llama.cpp, Ollama", export)
    commands.add_row("this run again", f"{train_command} --config {output / SETTINGS_FILE}")
    console.print(commands)
    console.print(f"done in {time.perf_counter() - prepared.started:.0f} s", highlight=False)


def _relative(path: str) -> str:
    inside = os.path.relpath(path)
    return path if inside.startswith("..") else inside
