"""One run of `python -m jaxtune.evaluate`: load, go on where an earlier run stopped, tell, save."""

import dataclasses
import hashlib
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import jax
from rich.console import Console
from rich.table import Table

from jaxtune import gpu_memory, hub
from jaxtune.checkpoint import leaves_checksum
from jaxtune.data.sources import load_dataset
from jaxtune.evaluate.results import Results
from jaxtune.evaluate.run import Plan, carry_out, plan
from jaxtune.evaluate.serving import ROWS, check_server, vllm_engine
from jaxtune.evaluate.store import COMPLETIONS, RESULTS, Store
from jaxtune.fast import FastLanguageModel
from jaxtune.job import make_console, make_table
from jaxtune.model import Model

if TYPE_CHECKING:
    from jaxtune.evaluate.__main__ import Evaluate

# Of EvaluateConfig, what changes completions without changing prompts.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "max_new_tokens", "seed")


def run(settings: "Evaluate", command: str) -> Results:
    """Evaluates, writes the folder and prints the table.

    Args:
        command: that was given, for results.json.

    Raises:
        ValueError, TypeError, OSError, ImportError: something that cannot be used; the message says why.
    """
    console = make_console()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    gpu_memory.claim(settings.serving.share_beside_jax)
    hub_set = {"subset": settings.dataset_config, "token": settings.token}
    rows = load_dataset(settings.data, settings.split, **hub_set)
    count = len(rows)
    if settings.limit is not None:
        rows = rows.select(range(min(settings.limit, count)))
    examples = settings.few_shot_data
    model, nf4 = load_model(settings)
    planned = plan(
        model,
        rows,
        settings.asking,
        question_column=settings.question_column,
        answer_column=settings.answer_column,
        few_shot_data=None if examples is None else load_dataset(examples, "train", **hub_set),
    )
    prompts = [_digest(ids) for ids in planned.prompts]
    made_by = decides(model, nf4, planned) | ({"engine": "vllm"} if settings.serving.use_vllm else {})
    folder = settings.output_dir or default_folder(settings)
    store = Store(folder, made_by, prompts)
    known = store.completions()
    wanted = [(i, j) for i in range(len(prompts)) for j in range(settings.asking.n)]
    there = sum(key in known for key in wanted)
    device = jax.devices()[0].device_kind
    console.print(f"[bold]jaxtune[/bold]: {settings.model} on {device}", highlight=False)
    if there:
        console.print(f"{there} of {len(wanted)} completions are in {folder / COMPLETIONS}")
    bar = sys.stderr.isatty()
    if settings.serving.use_vllm and there < len(wanted):
        with vllm_engine(model, planned, settings.serving, folder) as engine:
            gap = check_server(engine, planned, settings.serving)
            console.print(f"answers from vLLM, whose log-probabilities differ by {gap:.2g} from jaxtune's")
            results = carry_out(
                model, planned, known=known, save=store.save, engine=engine, rows=ROWS, progress=bar
            )
    else:
        results = carry_out(model, planned, known=known, save=store.save, progress=bar)
    about = {
        "command": command,
        "data": {
            "source": settings.data,
            "dataset_config": settings.dataset_config,
            "split": settings.split,
            "rows": count,
            "asked": len(prompts),
            "digest": _digest(prompts),
        },
        "settings": {**_plain(settings), "first_prompt": planned.turns[0]},
        "completions_decided_by": made_by,
        "versions": _versions(),
        "device": device,
    }
    printed = store.finish(results, about, settings.num_completions_to_print)
    if settings.num_completions_to_print > 0:
        print(printed)
    tell(console, results, folder)
    return results


def load_model(settings: "Evaluate") -> tuple[Model, bool]:
    """(the model, whether its weights are in NF4)."""
    name = hub.trained_in(settings.model)
    checkpoint = hub.resolve(name, revision=settings.revision, token=settings.token)
    nf4 = settings.load_in_4bit
    if nf4 is None:
        nf4 = checkpoint.adapter is not None or checkpoint.kind == "bnb-4bit"
    model, _ = FastLanguageModel.from_pretrained(
        name,
        devices=1,
        max_seq_length=settings.max_seq_length,
        load_in_4bit=nf4,
        revision=settings.revision,
        token=settings.token,
    )
    return model, nf4


def decides(model: Model, nf4: bool, planned: Plan) -> dict[str, Any]:
    """What a completion follows from, besides its prompt."""
    adapter = model.checkpoint.adapter
    return {
        "model": model.checkpoint.name_or_path,
        "adapter": None if adapter is None else str(adapter),
        "weights": "nf4" if nf4 else "as stored",
        "dtype": jax.numpy.dtype(model.dtype).name,
        "checksum": leaves_checksum({**model.base, **model.trainable}),
        **{name: getattr(planned.config, name) for name in SAMPLING},
    }


def default_folder(settings: "Evaluate") -> Path:
    """outputs/evaluate/MODEL_DATA, of the last two parts of the one's path and the last of the other's."""
    model = "-".join(Path(settings.model).parts[-2:]).strip("/")
    return Path("outputs") / "evaluate" / f"{model}_{Path(settings.data).stem}"


def tell(console: Console, results: Results, folder: Path) -> None:
    """Prints the metrics and where everything is."""
    console.print(metrics_table(results))
    where = make_table("", "")
    where.add_row("completions", str(folder / "completions" / "index.html"))
    where.add_row("results", str(folder / RESULTS))
    if results.new_tokens:
        speed = results.new_tokens / results.seconds
        where.add_row(
            "generated", f"{results.new_tokens:,} tokens in {results.seconds:.1f} s, {speed:,.0f} a second"
        )
    console.print(where)


def metrics_table(results: Results) -> Table:
    """A row for each metric: value, standard error, 95% interval."""
    questions, shares = len(results.judged), results.shares
    count = sum(len(one.completions) for one in results.judged)
    each = "" if count == questions else f", {count // questions} answers each"
    table = make_table(f"{questions} questions{each}", "", "± SE", "95% interval")
    for name, one in results.metrics.items():
        error = "" if questions == 1 else f"{one.standard_error:.1%}"
        table.add_row(name, f"[bold]{one.value:.1%}[/bold]", error, f"{one.low:.1%} to {one.high:.1%}")
    table.add_section()
    table.add_row(f"with an answer ({results.checker})", f"{shares['answered']:.1%}")
    table.add_row("cut at max_new_tokens", f"{shares['cut']:.1%}")
    table.add_row("tokens of an answer", f"{results.mean_tokens:.0f}")
    return table


def _versions() -> dict[str, str | None]:
    """Of everything that has a part in the numbers; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("jaxtune", "jax", "transformers", "math-verify"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _plain(settings: "Evaluate") -> dict[str, Any]:
    """The settings as JSON knows them; no access token."""
    values = dataclasses.asdict(settings)
    values |= values.pop("asking") | values.pop("serving")
    values.pop("token")
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
