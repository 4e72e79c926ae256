"""SFTTrainer: supervised fine-tuning. The loop is training_loop's; here are its data, its step and its evaluation.

Batch and random key are functions of (seed, step), so resuming is going on at step n.
"""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import datasets
import jax
import numpy as np
import optax

from jaxtune import cluster, images
from jaxtune.config import SFTConfig
from jaxtune.data import (
    Batches,
    VisionBatches,
    VisionDataCollator,
    content_digest,
    has_images,
    pack,
    prepare_dataset,
)
from jaxtune.data import UnslothVisionDataCollator as UnslothVisionDataCollator  # where Unsloth has it
from jaxtune.data.columns import ragged_column
from jaxtune.data.image_pool import default_workers
from jaxtune.data.image_sources import vision_rows
from jaxtune.data.prepare import attach_report, preparation_report
from jaxtune.data.responses import chat_tokenizer, text_tokenizer
from jaxtune.metrics import Record
from jaxtune.model import Model
from jaxtune.models.remat import Remat
from jaxtune.step import TrainStep, make_eval_step, make_train_step
from jaxtune.training_loop import Run, Trainer, checked_model, largest_eval_batch, within_model

# Collators that only pad and copy labels: what Batches does anyway.
PADDING_COLLATORS = ("DataCollatorForSeq2Seq", "DataCollatorForLanguageModeling", "DataCollatorWithPadding")

Dataset = datasets.Dataset


class SFTTrainer(Trainer[SFTConfig]):
    """Supervised fine-tuning, with the arguments and habits of TRL's and Unsloth's SFTTrainer.

    Args:
        model: from FastLanguageModel.from_pretrained and, unless full_finetuning, get_peft_model.
        args: SFTConfig.
        train_dataset, eval_dataset: a `datasets.Dataset`, a list of rows, a file or a hub name; eval_dataset
            may be a dict of them. Rows are tokenised here; packing happens when batches are made, so that
            train_on_responses_only(trainer) works in between. Rows with images: see `data.image_rows`.
        data_collator: a VisionDataCollator, which says how rows with images are prepared; for a model that takes images
            one with defaults is made where the first row has some. Others only pad, which happens anyway.
        processing_class (or tokenizer): the model's own by default; of a model that takes images its processor.
        formatting_func: row -> text.
        callbacks: objects with any of on_step_end(trainer, metrics), on_log(trainer, record) and
            on_save(trainer, folder). `trainer.should_stop = True` ends training after the step.
        dataset_text_field, max_seq_length, packing, dataset_num_proc: override args (older notebooks).

    Attributes:
        train_dataset, eval_dataset: tokenised, not packed: columns input_ids and labels (-100 = not trained), and
            documents where they have images.
        state: global_step, epoch, log_history, as in Hugging Face's Trainer.
    """

    def __init__(
        self,
        model: Model,
        args: SFTConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        formatting_func: Callable[[dict[str, Any]], Any] | None = None,
        *,
        tokenizer: Any = None,
        dataset_text_field: str | None = None,
        max_seq_length: int | None = None,
        packing: bool | None = None,
        dataset_num_proc: int | None = None,
    ) -> None:
        _refuse(compute_metrics=compute_metrics, peft_config=peft_config, optimizers=optimizers)
        model = checked_model(model, "SFTTrainer")
        args = _resolved_args(
            args,
            model,
            dataset_text_field=dataset_text_field,
            max_length=max_seq_length,
            packing=packing,
            dataset_num_proc=dataset_num_proc,
        )
        processing_class = processing_class or tokenizer or model.processor or model.tokenizer
        if eval_dataset is None and (args.eval_strategy != "no" or args.eval_on_start):
            raise ValueError(f"eval_strategy={args.eval_strategy!r} needs an eval_dataset; got None")

        collator = _vision_collator(
            data_collator,
            model,
            processing_class,
            args,
            eval_dataset if train_dataset is None else train_dataset,
        )

        if collator is not None:
            _refuse_beside_images(args, formatting_func)

        def prepare(data: Any, args: SFTConfig) -> Dataset:
            if collator is None:
                texts = prepare_dataset(data, chat_tokenizer(processing_class), args, formatting_func)
                return _of_texts_alone(texts, model)
            return _with_images(data, collator, args)

        def prepare_evaluation(data: Any, name: str = "eval_dataset") -> Dataset:
            try:
                return prepare(data, eval_args)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

        train = None if train_dataset is None else prepare(train_dataset, args)
        eval_args = args.for_evaluation()
        evaluation: Dataset | dict[str, Dataset] | None = None
        if isinstance(eval_dataset, Mapping):
            evaluation = {
                name: prepare_evaluation(data, f"eval_dataset[{name!r}]")
                for name, data in eval_dataset.items()
            }
        elif eval_dataset is not None:
            evaluation = prepare_evaluation(eval_dataset)
        super().__init__(model, args, train, evaluation, processing_class, callbacks)
        self._collator = collator
        self._evaluated: dict[int, tuple[Dataset, Batches | VisionBatches]] = {}

    @property
    def tokenizer(self) -> Any:
        """Older name of processing_class."""
        return self.processing_class

    def _make_batches(self) -> Batches | VisionBatches:
        return self._batches(self.train_dataset, train=True)

    def _make_step(self, optimizer: optax.GradientTransformation, remat: Remat) -> TrainStep:
        return make_train_step(
            self.model,
            optimizer,
            max_grad_norm=self.args.max_grad_norm,
            neftune_alpha=self.args.neftune_noise_alpha,
            remat=remat,
            layout=self.model.layout,
        )

    def _data_summary(self) -> dict[str, Any]:
        summary = {
            "rows of a step (total_batch_size)": self.args.batch_shape(self.model.layout.size)[2],
            "rows of data": len(self.train_dataset),
            "data (digest)": content_digest(self.train_dataset),
        }
        if self._collator is None:
            return summary
        documents = np.concatenate(self.train_dataset["documents"][:])
        return summary | {"images (digest)": self._collator.image_digest(documents)}

    def _end(self, run: Run) -> None:
        if isinstance(run.batches, VisionBatches):
            run.batches.close()

    def _batches(self, dataset: Dataset, *, train: bool) -> Batches | VisionBatches:
        args = self.args
        packed = args.packing if train else args.for_evaluation().packing
        if packed:
            dataset = pack(dataset, args.max_length or self.model.max_seq_length, args.packing_strategy)
        devices = self.model.layout.size
        steps, height, rows = args.batch_shape(devices)
        if not train:
            steps, height, rows = 1, args.per_device_eval_batch_size * devices, None
        how: dict[str, Any] = {
            "batch_size": height,
            "accumulation": steps,
            "max_length": args.max_length,
            "packed": packed,
            "seed": args.seed if args.data_seed is None else args.data_seed,
            "shuffle": train and args.train_sampling_strategy == "random",
            "rows_per_step": rows,
            "part": cluster.part(),
        }
        if self._collator is None:
            pad = text_tokenizer(self.processing_class).pad_token_id or 0
            return Batches(dataset, pad_token_id=pad, **how)
        workers = _workers(self._collator, args)
        workers = default_workers() if workers is None else workers
        return VisionBatches(dataset, self._collator, workers=workers, devices=devices, **how)

    def _window_record(self, window: Mapping[str, list[float]]) -> Record:
        return {
            "loss": sum(window["loss"]) / len(window["loss"]),
            "grad_norm": window["grad_norm"][-1],
            "mean_token_accuracy": sum(window["accuracy"]) / len(window["accuracy"]),
            "num_tokens": self.state.num_input_tokens_seen,
        }

    def _describe_batch(self, run: Run, n: int) -> list[str]:
        batch = run.batches.step(n)
        ids = batch["input_ids"].reshape(-1, batch["input_ids"].shape[-1])  # [G * B, T]
        used = batch["segment_ids"].reshape(ids.shape) > 0
        kind, tokenizer = "packed row" if self.args.packing else "row", text_tokenizer(self.processing_class)
        return [
            f"  {kind} {index}: {tokenizer.decode(row[mask][:24])!r}"
            for index, row, mask in zip(
                run.batches.own_rows(n), ids, used, strict=False
            )  # then come empty rows
        ]

    # -- evaluation ------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Mean loss over all label tokens of the evaluation data (dropout and noise off).

        Args:
            eval_dataset: prepared data (columns input_ids, labels) instead of self.eval_dataset.

        Returns:
            eval_loss (nats per token), eval_mean_token_accuracy, eval_runtime (seconds); for a dict of
            datasets each with its name: eval_<name>_loss.
        """
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if data is None:
            raise ValueError(
                "evaluate() needs an eval_dataset, here or in SFTTrainer(eval_dataset=…); got None"
            )
        if isinstance(data, Mapping):
            results = [self.evaluate(part, f"{metric_key_prefix}_{name}") for name, part in data.items()]
            return {name: value for result in results for name, value in result.items()}
        began = time.perf_counter()
        parts = [
            self._eval_step(self.model.trainable, self.model.base, self.model.layout.put_rows(batch, 0))
            for batch in self._eval_batches(data).eval_batches()
        ]
        totals = {name: math.fsum(float(part[name]) for part in jax.device_get(parts)) for name in parts[0]}
        loss = totals["loss_sum"] / max(totals["num_items"], 1)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"{metric_key_prefix}_loss is {loss} after step {self.state.global_step}"
            )
        return {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_mean_token_accuracy": totals["correct"] / max(totals["num_items"], 1),
            f"{metric_key_prefix}_runtime": time.perf_counter() - began,
        }

    def _largest_evaluations(self) -> Iterator[tuple[Any, tuple]]:
        data = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else {"": self.eval_dataset}
        for part in data.values():
            batch = largest_eval_batch(self._eval_batches(part))
            batch = self.model.layout.put_rows(batch, 0)
            yield self._eval_step, (self.model.trainable, self.model.base, batch)

    def _eval_batches(self, data: Dataset) -> Batches | VisionBatches:
        """The batches of an evaluation dataset, packed once."""
        if id(data) not in self._evaluated:
            self._evaluated[id(data)] = (
                data,
                self._batches(data, train=False),
            )  # held, so that no other gets its id
        return self._evaluated[id(data)][1]

    @cached_property
    def _eval_step(self) -> Callable[..., dict[str, jax.Array]]:
        return make_eval_step(self.model, layout=self.model.layout)


def _refuse(**arguments: Any) -> None:
    advice = {
        "compute_metrics": "the logits that it needs never exist; use model.generate on the evaluation rows",
        "peft_config": "call FastLanguageModel.get_peft_model(model, …) first",
        "optimizers": "set optim, learning_rate and lr_scheduler_type in SFTConfig",
    }
    for name, value in arguments.items():
        if value is not None and value != (None, None):
            raise ValueError(f"SFTTrainer: {name} is not supported; {advice[name]}")


def _vision_collator(
    given: Any, model: Model, processing_class: Any, args: SFTConfig, rows: Any
) -> VisionDataCollator | None:
    """The collator of rows with images: the given one, or one with defaults where the rows have images."""
    if isinstance(given, VisionDataCollator):
        return given
    _check_collator(given)
    if model.processor is None or rows is None:
        return None
    found = vision_rows(next(iter(rows.values())) if isinstance(rows, Mapping) else rows)[0]
    if not any(map(has_images, found)):
        return None
    return VisionDataCollator(
        model, processing_class, completion_only_loss=args.completion_only_loss is not False
    )


def _of_texts_alone(prepared: Dataset, model: Model) -> Dataset:
    """The same; raises ValueError where a token stands for an image, whose pixels nobody would read."""
    host = None if model.processor is None else images.family(model.config)
    if host is not None:
        ids = ragged_column(prepared, "input_ids")
        if (marks := np.isin(ids.values, sorted(host.placeholder_ids))).any():
            place = int(marks.argmax())
            row = int(np.flatnonzero((ids.starts <= place) & (place < ids.starts + ids.lengths))[0])
            raise ValueError(
                f"row {row} of the prepared rows has a token that stands for an image, and no image was "
                "found beside the rows, so they are read as text alone. Give "
                "data_collator=VisionDataCollator(model, processor)"
            )
    return prepared


def _refuse_beside_images(args: SFTConfig, formatting_func: Any) -> None:
    advice = {
        "formatting_func": (
            formatting_func,
            "give it to VisionDataCollator, where it makes rows of a known format",
        ),
        "chat_template_path": (args.chat_template_path, "set processor.chat_template"),
        "eos_token": (args.eos_token, "set processor.tokenizer.eos_token"),
    }
    for name, (value, instead) in advice.items():
        if value is not None:
            raise ValueError(f"SFTTrainer: {name} is not for rows with images; {instead}")
    if args.packing and args.packing_strategy != "bfd":
        raise ValueError(
            f"SFTTrainer: packing_strategy={args.packing_strategy!r} cuts rows in two, and with them images; rows with "
            "images are packed whole, by 'bfd'"
        )


def _with_images(data: Any, collator: VisionDataCollator, args: SFTConfig) -> Dataset:
    prepared = collator.prepare(
        data,
        max_length=args.max_length,
        workers=_workers(collator, args),
        assistant_only_loss=args.assistant_only_loss,
        text_field=args.dataset_text_field,
        progress=not args.disable_tqdm,
    )
    if not args.shuffle_dataset:
        return prepared
    return attach_report(prepared.shuffle(seed=args.seed), preparation_report(prepared))


def _workers(collator: VisionDataCollator, args: SFTConfig) -> int | None:
    return (args.dataloader_num_workers or None) if collator.num_proc is None else collator.num_proc


def _check_collator(collator: Any) -> None:
    if collator is None:
        return
    name = type(collator).__name__
    if name not in PADDING_COLLATORS or getattr(collator, "mlm", False):
        raise ValueError(
            f"SFTTrainer: data_collator={name} is not supported; put what it does into the dataset "
            "(columns input_ids and labels are taken as they are)"
        )
    warnings.warn(f"SFTTrainer: data_collator={name} is not needed and not used", stacklevel=4)


def _resolved_args(args: SFTConfig | None, model: Model, **overrides: Any) -> SFTConfig:
    """args with the older keywords put in, and max_length held to what the model was loaded for."""
    if args is not None and not isinstance(args, SFTConfig):
        raise TypeError(
            f"args must be a jaxtune.SFTConfig, got {type(args).__name__}; the argument names are the same"
        )
    args = dataclasses.replace(
        args or SFTConfig(), **{name: value for name, value in overrides.items() if value is not None}
    )
    return dataclasses.replace(args, max_length=within_model(args.max_length, model))
