"""`python -m jaxtune.train --dry_run`: what a run would be, without loading a weight.

Sizes come from config.json and the checkpoint's index; memory from compiling the training step on shapes.
"""

import dataclasses
import itertools
import types
from typing import Any

import datasets
import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from jaxtune import hub, images
from jaxtune.budget import PlannedStep
from jaxtune.command_line import Job
from jaxtune.data import (
    Batches,
    VisionBatches,
    VisionDataCollator,
    pack,
    prepare_dataset,
    render_example,
    token_statistics,
    train_on_responses_only,
)
from jaxtune.data.responses import text_tokenizer
from jaxtune.data.statistics import IMAGE
from jaxtune.devices import ROWS, STEP_ROWS, WHOLE, Layout, device_bytes
from jaxtune.fast import as_dtype, in_fp8, layout_for, side_of
from jaxtune.job import load_rows, make_console, make_table, targets, vision_collator, with_chat_template
from jaxtune.lora import LoraConfig, attach, chosen_targets, read_adapter, train_everything
from jaxtune.models import build
from jaxtune.models.decoder import CausalLM
from jaxtune.models.names import leaf_shapes, trainable_paths
from jaxtune.optim import make_optimizer
from jaxtune.step import make_eval_step, make_train_step
from jaxtune.training_loop import largest_eval_batch


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device: what lies there for the whole run, and what a training step and an evaluation add at
    their peaks."""

    base: int
    trained: int
    optimizer: int
    step: int
    evaluation: int = 0

    @property
    def total(self) -> int:
        return self.base + self.trained + self.optimizer + max(self.step, self.evaluation)


def dry_run(job: Job, console: Console | None = None) -> None:
    """Print settings, model size, predicted memory, token statistics and the first row with its labels.

    Raises:
        ValueError, TypeError, OSError: a setting, model or dataset that cannot be used; the message says why.
    """
    console = console or make_console()
    console.print(Syntax(job.to_yaml(), "yaml", background_color="default"))
    checkpoint = hub.resolve(
        job.model.model_name,
        revision=job.model.revision,
        token=job.model.token,
        local_files_only=job.model.local_files_only,
        cache_dir=job.model.cache_dir,
    )
    checkpoint = side_of(checkpoint, job.model.text_only)
    module = model_of_shapes(checkpoint, job)
    rows, held_out = load_rows(job)
    host = images.family(checkpoint.config)
    processing_class = checkpoint.tokenizer() if host is None else checkpoint.processor()
    processing_class = with_chat_template(processing_class, job)
    like = types.SimpleNamespace(config=checkpoint.config, dtype=module.dtype)
    collator = vision_collator(job, like, None if host is None else processing_class, rows)
    train = _prepare(rows, processing_class, collator, job)
    layout = layout_of(module, job)
    batch = _text_shapes(layout, job) if collator is None else _vision_shapes(layout, train, collator, job)
    parts, evaluated = {"training": train}, None
    if held_out is not None:
        evaluation = dataclasses.replace(job, training=job.training.for_evaluation())
        parts["held-out"] = _prepare(held_out, processing_class, collator, evaluation)
        evaluated = _evaluation_shapes(layout, parts["held-out"], collator, evaluation)
    console.print(_size_table(checkpoint, module, job, batch, evaluated))
    console.print(_data_table(parts))
    styles = [("trained", "bold green"), ("not trained", "dim")] + [("image", IMAGE)] * (collator is not None)
    legend = Text.assemble(
        "first row: ", *itertools.chain(*((style, ", ") for style in styles[:-1])), styles[-1]
    )
    marks = None if host is None else host.image_token_id
    shown = render_example(text_tokenizer(processing_class), train[0], marks)
    console.print(Panel(shown, title=legend, title_align="left"))
    if collator is not None:
        collator.close()


def model_of_shapes(checkpoint: hub.Checkpoint, job: Job) -> CausalLM:
    """The model of a job with its adapter, every leaf a shape: nothing is read or allocated."""
    dtype, nf4 = as_dtype(job.model.dtype), _is_quantised(job)
    fp8 = in_fp8(job.model.compute_dtype, dtype, nf4=nf4)
    module = build(checkpoint.config, dtype, nf4=nf4, fp8=fp8)
    if job.model.full_finetuning:
        train_everything(module)
    elif checkpoint.adapter is not None:
        attach(module, read_adapter(checkpoint.adapter, checkpoint.text_side)[0])
    else:
        fields: dict[str, Any] = dataclasses.asdict(job.lora)
        fields["modules_to_save"] = job.lora.modules_to_save or ()
        sees = images.family(checkpoint.config) is not None
        parts = {name: fields.pop(f"finetune_{name}_layers") for name in ("vision", "language")}
        parts |= {name: fields.pop(f"finetune_{name}_modules") for name in ("attention", "mlp")}
        fields["target_modules"] = chosen_targets(module, targets(job, sees=sees), sees=sees, **parts)
        attach(module, LoraConfig(**fields))
    return module


def _text_shapes(layout: Layout, job: Job) -> dict[str, Any]:
    """The shapes of a step's batch of text, on all devices."""
    args = job.training
    length = args.max_length or job.model.max_seq_length
    steps, rows, _ = args.batch_shape(layout.size)

    def shape(columns: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((steps, rows, columns), jnp.int32, sharding=layout.sharding(STEP_ROWS))

    names = ("input_ids", "labels", "positions", "segment_ids")
    return dict.fromkeys(names, shape(length)) | {"starts": shape(2 if args.packing else 1)}


def _vision_shapes(
    layout: Layout, train: datasets.Dataset, collator: VisionDataCollator, job: Job
) -> dict[str, Any]:
    """The shapes of the largest step of the first epoch, on all devices."""
    args = job.training
    steps, height, rows = args.batch_shape(layout.size)
    if args.packing:
        train = pack(train, args.max_length or job.model.max_seq_length, args.packing_strategy)
    batches = VisionBatches(
        train,
        collator,
        batch_size=height,
        accumulation=steps,
        max_length=args.max_length,
        packed=args.packing,
        seed=args.seed if args.data_seed is None else args.data_seed,
        rows_per_step=rows,
        devices=layout.size,
    )
    return _placed(batches.step(batches.largest_step), layout.sharding(STEP_ROWS))


def _evaluation_shapes(
    layout: Layout, held_out: datasets.Dataset, collator: VisionDataCollator | None, job: Job
) -> dict[str, Any]:
    """The shapes of the largest batch of an evaluation, on all devices."""
    args = job.training
    if args.packing:
        held_out = pack(held_out, args.max_length or job.model.max_seq_length, args.packing_strategy)
    how: dict[str, Any] = {
        "batch_size": args.per_device_eval_batch_size * layout.size,
        "max_length": args.max_length,
        "packed": args.packing,
        "shuffle": False,
    }
    if collator is None:
        batch = largest_eval_batch(Batches(held_out, pad_token_id=0, **how))
    else:
        batch = largest_eval_batch(VisionBatches(held_out, collator, devices=layout.size, **how))
    return _placed(batch, layout.sharding(ROWS))


def _placed(batch: dict[str, Any], sharding: Any) -> dict[str, Any]:
    return jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding), batch
    )


def predict_memory(
    module: CausalLM, job: Job, batch: dict[str, Any], evaluated: dict[str, Any] | None = None
) -> Memory:
    """Compile the training step and the evaluation of a model of shapes and ask the compiler what they need.

    Args:
        batch: shapes of a step. evaluated: of a batch of the evaluation, if there is one.
    """
    args, shapes, paths = job.training, leaf_shapes(module), trainable_paths(module)
    layout = layout_of(module, job)
    specs = layout.specs(module, shapes)

    def placed(shape: Any, spec: Any = WHOLE) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=layout.sharding(spec))

    leaves: dict[str, Any] = {path: placed(shape, specs[path]) for path, shape in shapes.items()}
    trainable = {path: shape for path, shape in leaves.items() if path in paths}
    base = {path: shape for path, shape in leaves.items() if path not in paths}
    optimizer = make_optimizer(args, 100, trainable)
    opt_state = jax.tree.map(placed, jax.eval_shape(optimizer.init, trainable))
    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = (trainable, opt_state, base, batch, key)
    model = types.SimpleNamespace(graphdef=nnx.graphdef(module), module=module, dtype=module.dtype)
    step = PlannedStep(
        lambda remat: make_train_step(
            model,
            optimizer,
            max_grad_norm=args.max_grad_norm,
            neftune_alpha=args.neftune_noise_alpha,
            remat=remat,
            layout=layout,
        ),
        model,
        args.remat if args.gradient_checkpointing else "none",
        args.memory_budget_gb,
        layout=layout,
    )
    programs = [step.compile(arguments)]
    if evaluated is not None:
        evaluation: Any = make_eval_step(model, layout=layout)
        programs.append(evaluation.lower(trainable, base, evaluated).compile())
    adds = [program.memory_analysis().temp_size_in_bytes for program in programs]
    return Memory(_bytes(base), _bytes(trainable), _bytes(opt_state), *adds)


def layout_of(module: CausalLM, job: Job) -> Layout:
    """Where a run of the job would put the model."""
    return layout_for(module, job.model.devices, job.model.data, job.model.fsdp)


def _is_quantised(job: Job) -> bool:
    return job.model.load_in_4bit and not (job.model.load_in_16bit or job.model.full_finetuning)


def _bytes(tree: object) -> int:
    return sum(map(device_bytes, jax.tree.leaves(tree)))


def _prepare(
    rows: datasets.Dataset, processing_class: Any, collator: VisionDataCollator | None, job: Job
) -> datasets.Dataset:
    if collator is None:
        prepared = prepare_dataset(rows, text_tokenizer(processing_class), job.training)
    else:
        prepared = collator.prepare(
            rows,
            max_length=job.training.max_length,
            assistant_only_loss=job.training.assistant_only_loss,
            text_field=job.training.dataset_text_field,
        )
    if not job.data.train_on_responses_only:
        return prepared
    holder = types.SimpleNamespace(
        processing_class=processing_class, train_dataset=prepared, eval_dataset=None
    )
    parts = (job.data.instruction_part, job.data.response_part)
    return train_on_responses_only(holder, *parts).train_dataset


def _size_table(
    checkpoint: hub.Checkpoint,
    module: CausalLM,
    job: Job,
    batch: dict[str, Any],
    evaluated: dict[str, Any] | None,
) -> Table:
    parameters = sum(_size(checkpoint.info(name).shape) for name in checkpoint.names())
    trained = sum(leaf_shapes(module)[path].size for path in trainable_paths(module))
    memory, args = predict_memory(module, job, batch, evaluated), job.training
    kept = "NF4" if _is_quantised(job) else str(jnp.dtype(module.dtype))
    table = make_table(f"model ({checkpoint.config.model_type})", "parameters", "memory")
    table.add_row(f"base, {kept}", f"{parameters:,}", _mib(memory.base))
    table.add_row("trained, float32", f"{trained:,}", _mib(memory.trained))
    table.add_row(f"optimizer ({args.optim})", "", _mib(memory.optimizer))
    table.add_row(f"training step ({_shape(batch)})", "", _mib(memory.step))
    if evaluated is not None:
        table.add_row(f"evaluation ({_shape(evaluated)})", "", _mib(memory.evaluation))
    layout = layout_of(module, job)
    where = "the device" if layout.size == 1 else f"each of {layout.size} devices"
    table.add_row(f"[bold]predicted peak on {where}[/bold]", "", f"[bold]{_mib(memory.total)}[/bold]")
    return table


def _data_table(parts: dict[str, datasets.Dataset]) -> Table:
    table = make_table("data", "rows", "dropped", "cut", "tokens", "trained", "length 5 / 50 / 95 / 100 %")
    for name, dataset in parts.items():
        count = token_statistics(dataset)
        table.add_row(
            name,
            f"{count.rows:,}",
            f"{count.dropped:,}",
            f"{count.truncated:,}",
            f"{count.tokens:,}",
            f"{count.trained:,} ({count.trained_fraction:.0%})",
            " / ".join(str(length) for length in count.percentiles.values()),
        )
    return table


def _shape(batch: dict[str, Any]) -> str:
    rows, length = batch["input_ids"].shape[-2:]
    return f"{rows} × {length} tokens"


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
