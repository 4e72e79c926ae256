"""One run of `python -m jaxtune.rl.train`: load, train, save, tell.

prepare(job) -> Prepared    everything that bad settings, models, data or reward functions can break
train(prepared)             the rest
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from rich.console import Console

from jaxtune import cluster
from jaxtune.data import load_dataset
from jaxtune.job import SETTINGS_FILE, load_model, make_console, make_table
from jaxtune.rl import rewards
from jaxtune.rl.command_line import GRPOJob, PromptArguments
from jaxtune.rl.trainer import GRPOTrainer
from jaxtune.tasks import arithmetic

ROWS = 512  # of the shipped task


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A job with its model, data and reward functions loaded."""

    job: GRPOJob
    trainer: GRPOTrainer
    console: Console


def prepare(job: GRPOJob) -> Prepared:
    """Load the model, the prompts and the reward functions.

    Raises:
        ValueError, TypeError, OSError: something that cannot be used; the message says why.
    """
    console = make_console()
    functions = [reward_function(name) for name in job.data.reward_funcs] or [
        arithmetic.correct,
        arithmetic.short,
    ]
    train_rows, held_out = load_rows(job.data, job.model.token)
    model, tokenizer = load_model(job, console)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=functions,
        args=job.training,
        train_dataset=train_rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    return Prepared(job, trainer, console)


def load_rows(data: PromptArguments, token: str | None) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """(rows to train on, held-out rows or None), with their prompts in the column "prompt"."""
    if data.dataset is None:
        return datasets.Dataset.from_list(arithmetic.make_rows(ROWS)), None
    train = load_dataset(data.dataset, data.split, subset=data.dataset_config, token=token)
    held_out = None
    if data.eval_dataset is not None or data.eval_split is not None:
        name, split = data.eval_dataset or data.dataset, data.eval_split or data.split
        held_out = with_prompts(load_dataset(name, split, subset=data.dataset_config, token=token), data)
    return with_prompts(train, data), held_out


def with_prompts(rows: datasets.Dataset, data: PromptArguments) -> datasets.Dataset:
    """Rows whose prompts stand in the column "prompt", with the system message in front."""
    if data.prompt_column not in rows.column_names:
        raise ValueError(
            f"prompt_column={data.prompt_column!r} is no column of the data; it has {', '.join(rows.column_names)}"
        )
    if data.prompt_column == "prompt" and data.system_prompt is None:
        return rows
    prompts = rows[data.prompt_column]
    if data.system_prompt is not None:
        system = {"role": "system", "content": data.system_prompt}
        prompts = [
            [system, *([{"role": "user", "content": one}] if isinstance(one, str) else one)]
            for one in prompts
        ]
    columns = {name: rows[name][:] for name in rows.column_names if name != "prompt"}
    return datasets.Dataset.from_dict({"prompt": list(prompts), **columns})


def reward_function(name: str) -> Callable[..., Any]:
    """The function that FILE.py:NAME or a name of jaxtune.rl.rewards means.

    Raises:
        ValueError, OSError: there is none; the message says what was looked for.
    """
    path, _, function = name.rpartition(":")
    if not path:
        if name.startswith("_") or not callable(getattr(rewards, name, None)):
            known = [
                n for n in vars(rewards) if n.endswith(("_reward", "_punishment")) and not n.startswith("_")
            ]
            raise ValueError(f"reward_funcs: {name!r} is neither FILE.py:NAME nor one of {', '.join(known)}")
        return getattr(rewards, name)
    if not Path(path).is_file():
        raise FileNotFoundError(f"reward_funcs: there is no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ValueError(f"reward_funcs: {path} has no function {function!r}")
    return getattr(module, function)


def train(prepared: Prepared) -> None:
    """Train, save, and print how the reward went and where everything is."""
    job, trainer, console = prepared.job, prepared.trainer, prepared.console
    output = Path(job.training.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    if cluster.is_first():
        (output / SETTINGS_FILE).write_text(job.to_yaml())
    trainer.train()
    folder = output / ("model" if trainer.model.lora is None else "adapter")
    trainer.save_model(str(folder))
    rewards_seen = [r["reward"] for r in trainer.state.log_history if r.get("reward") is not None]
    table = make_table("", "")
    if rewards_seen:
        table.add_row("reward", f"{rewards_seen[0]:.3f} at first, {rewards_seen[-1]:.3f} at last")
    table.add_row("adapter (PEFT)" if folder.name == "adapter" else "model (transformers)", str(folder))
    table.add_row("history", str(output / "history.jsonl"))
    if job.training.log_completions:
        table.add_row("completions", str(output / "completions" / "index.html"))
    table.add_row("this run again", f"{job.PROGRAM} --config {output / SETTINGS_FILE}")
    console.print(table)
