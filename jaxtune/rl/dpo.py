"""DPOTrainer: direct preference optimisation, as TRL defines it. The loop is training_loop's."""

import dataclasses
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import datasets
import jax
import numpy as np
import optax
from tqdm.auto import tqdm

from jaxtune import cluster
from jaxtune.checkpoint import leaves_checksum
from jaxtune.data import (
    PAIR_COLUMNS,
    Batches,
    VisionBatches,
    VisionDataCollator,
    content_digest,
    has_images,
    pair_rows,
    prepare_image_pairs,
    prepare_preferences,
)
from jaxtune.data.columns import DOCUMENTS
from jaxtune.data.image_pool import default_workers
from jaxtune.data.image_sources import vision_rows
from jaxtune.data.responses import chat_tokenizer, text_tokenizer
from jaxtune.metrics import Record, mean
from jaxtune.model import Model
from jaxtune.models.remat import Remat
from jaxtune.rl.dpo_config import DPOConfig
from jaxtune.rl.dpo_step import make_dpo_eval, make_dpo_step, make_pair_log_probs
from jaxtune.rl.reference import reference_leaves, without_adapter
from jaxtune.step import TrainStep
from jaxtune.training_loop import Run, Trainer, checked_model, largest_eval_batch, within_model

REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
NOT_LOGGED = ("num_tokens",)

Dataset = datasets.Dataset


class DPOTrainer(Trainer[DPOConfig]):
    """Training on preferences, with the arguments and habits of TRL's DPOTrainer.

    Args:
        model: from FastLanguageModel.from_pretrained and, unless full_finetuning, get_peft_model.
        ref_model: None. The reference is the model as it is now: without its adapter where that is new, else with a
            copy of what is trained.
        args: DPOConfig.
        train_dataset, eval_dataset: a `datasets.Dataset`, a list of rows, a file or a hub name, with the columns
            chosen, rejected and prompt; see prepare_preferences. eval_dataset may be a dict of them.
        processing_class (or tokenizer): the model's own by default.
        callbacks: as SFTTrainer's.
        beta, max_length: override args (older notebooks).

    Attributes:
        train_dataset, eval_dataset: tokenised: columns prompt_ids, chosen_ids, rejected_ids and, with
            precompute_ref_log_probs, ref_chosen_logps and ref_rejected_logps.
        state: global_step, epoch, log_history, as in Hugging Face's Trainer.
    """

    def __init__(
        self,
        model: Model,
        ref_model: None = None,
        args: DPOConfig | None = None,
        data_collator: None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        *,
        tokenizer: Any = None,
        beta: float | None = None,
        max_length: int | None = None,
        max_prompt_length: int | None = None,
    ) -> None:
        _refuse(
            ref_model=ref_model,
            data_collator=data_collator,
            compute_metrics=compute_metrics,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        model = checked_model(model, "DPOTrainer")
        args = _resolved_args(args, model, beta=beta, max_length=max_length)
        if max_prompt_length is not None:
            warnings.warn("DPOTrainer: max_prompt_length is not used; max_length cuts", stacklevel=2)
        if eval_dataset is None and (args.eval_strategy != "no" or args.eval_on_start):
            raise ValueError(f"eval_strategy={args.eval_strategy!r} needs an eval_dataset; got None")
        processing_class = processing_class or tokenizer or model.processor or model.tokenizer
        super().__init__(model, args, None, None, processing_class, callbacks)
        self._collator: VisionDataCollator | None = None  # of pairs with images
        self._loss = args.loss_options()
        self._reference = reference_leaves(model.on_one_device())
        if train_dataset is not None:
            self.train_dataset = self._prepared(train_dataset, train=True)
        if isinstance(eval_dataset, Mapping):
            self.eval_dataset = {n: self._prepared(data, train=False) for n, data in eval_dataset.items()}
        elif eval_dataset is not None:
            self.eval_dataset = self._prepared(eval_dataset, train=False)

    @property
    def tokenizer(self) -> Any:
        """Older name of processing_class."""
        return self.processing_class

    # -- data ------------------------------------------------------------------------------------------------

    def _prepared(self, data: Any, *, train: bool) -> Dataset:
        if any(map(has_images, vision_rows(data)[0])):
            pairs = self._with_images(data)
        else:
            text = chat_tokenizer(self.processing_class)
            pairs = prepare_preferences(data, text, self.args.max_length)
        if not self.args.precompute_ref_log_probs or set(REF_COLUMNS) <= set(pairs.column_names):
            return pairs
        found = self._reference_log_probs(pairs, train=train)
        for name, column in zip(REF_COLUMNS, found.T, strict=True):
            pairs = pairs.add_column(name, column)
        return pairs

    def _with_images(self, data: Any) -> Dataset:
        """Pairs with images, which the collator keeps.

        Raises:
            ValueError: the model takes none.
        """
        if self.model.processor is None:
            raise ValueError(
                "the data has images, and the model takes none; load one with FastVisionModel, or remove the columns "
                "image and images"
            )
        if self._collator is None:
            self._collator = VisionDataCollator(self.model, self.processing_class, resize="max")
        workers, quiet = self.args.dataloader_num_workers or None, bool(self.args.disable_tqdm)
        return prepare_image_pairs(
            data, self._collator, self.args.max_length, workers=workers, progress=not quiet
        )

    def _reference_log_probs(self, pairs: Dataset, *, train: bool) -> np.ndarray:
        """Of every pair, float32 [N, 2]."""
        args = self.args
        usual = args.per_device_train_batch_size if train else args.per_device_eval_batch_size
        batches = self._batches(pairs, args.precompute_ref_batch_size or usual, shuffle=False)
        log_probs = make_pair_log_probs(self.model, self._loss)
        one = self.model.on_one_device()
        base = without_adapter(one.base) if self._reference is None else one.base
        leaves = one.trainable if self._reference is None else self._reference
        progress = tqdm(batches.eval_batches(), "Reference", disable=bool(args.disable_tqdm))
        parts = [np.asarray(log_probs(leaves, base, batch)) for batch in progress]
        return np.concatenate(parts)[: len(pairs)]

    def _batches(
        self, pairs: Dataset, size: int, *, shuffle: bool, devices: int = 1, **more: Any
    ) -> Batches | VisionBatches:
        """Batches of `size` pairs for each of these devices; more: as of Batches."""
        args, numbers = self.args, {}
        if args.precompute_ref_log_probs and set(REF_COLUMNS) <= set(pairs.column_names):
            both = np.asarray([pairs[name][:] for name in REF_COLUMNS], np.float32)  # [2, N]
            numbers = {"ref_log_probs": both.T.reshape(-1)}
        how: dict[str, Any] = {
            "batch_size": 2 * size * devices,
            "max_length": args.max_length,
            "packed": False,
            "seed": args.seed if args.data_seed is None else args.data_seed,
            "shuffle": shuffle,
            "together": 2,
            "numbers": numbers,
            **more,
        }
        rows = pair_rows(pairs, args.max_length)
        if DOCUMENTS in pairs.column_names:
            assert self._collator is not None, "it prepared these pairs"
            workers = args.dataloader_num_workers or default_workers()
            return VisionBatches(rows, self._collator, workers=workers, devices=devices, **how)
        return Batches(rows, pad_token_id=text_tokenizer(self.processing_class).pad_token_id or 0, **how)

    def _end(self, run: Run) -> None:
        if self._collator is not None:
            self._collator.close()

    def _make_batches(self) -> Batches | VisionBatches:
        args = self.args
        return self._batches(
            self.train_dataset,
            args.per_device_train_batch_size,
            shuffle=args.train_sampling_strategy == "random",
            devices=self.model.layout.size,
            accumulation=args.gradient_accumulation_steps,
            part=cluster.part(),
        )

    def _filled(self, run: Run, n: int) -> int:
        """Micro-batches of step n that have pairs; the last step of an epoch may be short."""
        return math.ceil(len(run.batches.rows(n)) / run.batches.batch_size)

    def _batch(self, run: Run, n: int) -> dict[str, Any]:
        accumulation = np.full(run.batches.accumulation, self._filled(run, n), np.float32)
        layout = self.model.layout
        batch = layout.put_rows({**run.batches.step(n), "accumulation": accumulation}, 1)
        if "ref_log_probs" in batch or self._reference is None:
            return batch
        return {**batch, "reference": layout.put_leaves(self.model.module, self._reference)}

    # -- step ------------------------------------------------------------------------------------------------

    def _make_step(self, optimizer: optax.GradientTransformation, remat: Remat) -> TrainStep:
        return make_dpo_step(
            self.model,
            optimizer,
            self._loss,
            max_grad_norm=self.args.max_grad_norm,
            dropout=not self.args.disable_dropout,
            remat=remat,
            layout=self.model.layout,
        )

    def _values(self, n: int, metrics: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {name: float(x) if np.ndim(x) == 0 else np.asarray(x) for name, x in metrics.items()}

    def _window_record(self, window: Mapping[str, list[float]]) -> Record:
        record: Record = {name: mean(values) for name, values in window.items() if name not in NOT_LOGGED}
        return record | {"grad_norm": window["grad_norm"][-1], "num_tokens": self.state.num_input_tokens_seen}

    def _data_summary(self) -> dict[str, Any]:
        summary = {
            "rows of data": len(self.train_dataset),
            "data (digest)": content_digest(self.train_dataset, PAIR_COLUMNS),
        }
        if self._collator is not None and DOCUMENTS in self.train_dataset.column_names:
            documents = np.concatenate(self.train_dataset[DOCUMENTS][:])
            summary["images (digest)"] = self._collator.image_digest(documents)
        if self._reference is not None:
            summary["reference (checksum of a sample)"] = leaves_checksum(self._reference)
        return summary

    def _describe_batch(self, run: Run, n: int) -> list[str]:
        pairs = [int(row) // 2 for row in run.batches.rows(n)[::2]]
        return [f"  pair {number}: {self._describe_pair(self.train_dataset[number])}" for number in pairs]

    def _describe_pair(self, pair: Mapping[str, list[int]]) -> str:
        decode = self.processing_class.decode
        return ", ".join(f"{name.removesuffix('_ids')} {decode(pair[name][:24])!r}" for name in PAIR_COLUMNS)

    # -- evaluation ------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss and rewards of the evaluation data.

        Args:
            eval_dataset: what the trainer takes, instead of its own.

        Returns:
            eval_loss, eval_rewards/accuracies, … as in training, and eval_runtime (seconds); for a dict of datasets
            each with its name: eval_<name>_loss.
        """
        batches = self._eval_batches
        if eval_dataset is not None:
            named = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
            batches = {
                n: self._eval_batches_of(self._prepared(data, train=False)) for n, data in named.items()
            }
        if not batches:
            raise ValueError(
                "evaluate() needs an eval_dataset, here or in DPOTrainer(eval_dataset=…); got None"
            )
        results: dict[str, Any] = {}
        for name, part in batches.items():
            prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
            results |= {f"{prefix}_{key}": value for key, value in self._evaluated(part).items()}
            if not math.isfinite(results[f"{prefix}_loss"]):
                raise FloatingPointError(
                    f"{prefix}_loss is {results[f'{prefix}_loss']} after step {self.state.global_step}"
                )
        return results

    def _evaluated(self, batches: Batches | VisionBatches) -> dict[str, float | None]:
        began = time.perf_counter()
        found, pairs, one = [], [], self.model.on_one_device()
        for batch in batches.eval_batches():
            leaves = (one.trainable, one.base, self._reference)
            found.append(self._eval_step(*leaves, batch))
            pairs.append(np.count_nonzero(batch["segment_ids"][:, 0]) / 2)
        parts = jax.device_get(found)
        loss = float(np.average([part.pop("loss") for part in parts], weights=pairs))
        metrics = {name: mean(float(part[name]) for part in parts) for name in parts[0]}
        return {"loss": loss, **metrics, "runtime": time.perf_counter() - began}

    def _largest_evaluations(self) -> Iterator[tuple[Any, tuple]]:
        one = self.model.on_one_device()
        for batches in self._eval_batches.values():
            batch = largest_eval_batch(batches)
            yield self._eval_step, (one.trainable, one.base, self._reference, batch)

    def _eval_batches_of(self, pairs: Dataset) -> Batches | VisionBatches:
        return self._batches(pairs, self.args.per_device_eval_batch_size, shuffle=False)

    @cached_property
    def _eval_batches(self) -> dict[str, Batches | VisionBatches]:
        """Those of the trainer's own evaluation data."""
        data = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else {"": self.eval_dataset}
        return {name: self._eval_batches_of(pairs) for name, pairs in data.items() if pairs is not None}

    @cached_property
    def _eval_step(self):
        return make_dpo_eval(self.model, self._loss)


def _refuse(**arguments: Any) -> None:
    advice = {
        "ref_model": "the reference is the model as it is now, so start from the one that is to be the reference",
        "data_collator": "put what it does into the dataset; prompt_ids, chosen_ids, rejected_ids are kept",
        "compute_metrics": "the logits that it needs never exist",
        "optimizers": "set optim, learning_rate and lr_scheduler_type in DPOConfig",
        "peft_config": "call FastLanguageModel.get_peft_model(model, …) first",
    }
    for name, value in arguments.items():
        if value is not None and value != (None, None):
            raise ValueError(f"DPOTrainer: {name} is not supported; {advice[name]}")


def _resolved_args(args: DPOConfig | None, model: Model, **overrides: Any) -> DPOConfig:
    """args with the older keywords put in, and max_length held to what the model was loaded for."""
    if args is not None and not isinstance(args, DPOConfig):
        raise TypeError(
            f"args must be a jaxtune.DPOConfig, got {type(args).__name__}; the argument names are the same"
        )
    given = {name: value for name, value in overrides.items() if value is not None}
    args = dataclasses.replace(args or DPOConfig(), **given)
    return dataclasses.replace(args, max_length=within_model(args.max_length, model))
