"""SFTTrainer: the host loop around the pure training step. Read `train`, then `_loop`.

The step (jaxtune.step) computes; everything here is bookkeeping: which batch, which key, when to log,
evaluate and save. Batch and random key are functions of (seed, step), so resuming is going on at step n.
"""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import checkpoint
from jaxtune.budget import PlannedStep
from jaxtune.config import Event, SFTConfig
from jaxtune.data import Batches, pack, prepare_dataset
from jaxtune.metrics import History, Progress, Record, Speed, TrainerState, peak_memory_gib, plot_losses
from jaxtune.model import Model
from jaxtune.optim import make_optimizer, make_schedule
from jaxtune.signals import StopSignals
from jaxtune.step import make_eval_step, make_train_step

# Collators that only pad and copy labels: what Batches does anyway.
PADDING_COLLATORS = ("DataCollatorForSeq2Seq", "DataCollatorForLanguageModeling", "DataCollatorWithPadding")
CALLBACK_METHODS = ("on_step_end", "on_log", "on_save")

Dataset = datasets.Dataset


class TrainOutput(NamedTuple):
    """What train() returns: steps done, mean loss over all of them, run time and speed."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


@dataclasses.dataclass
class _Run:
    """What one call of train() works with."""

    batches: Batches
    num_steps: int
    learning_rates: np.ndarray  # [num_steps]
    fingerprint: dict[str, Any]
    history: History
    progress: Progress
    speed: Speed
    saved: list[int]  # steps of the checkpoints that belong to this run, oldest first


class SFTTrainer:
    """Supervised fine-tuning, with the arguments and habits of TRL's and Unsloth's SFTTrainer.

    Args:
        model: from FastLanguageModel.from_pretrained and, unless full_finetuning, get_peft_model.
        args: SFTConfig.
        train_dataset, eval_dataset: a `datasets.Dataset`, a list of rows, a file or a hub name; eval_dataset
            may be a dict of them. Rows are tokenised here; packing happens when batches are made, so that
            train_on_responses_only(trainer) works in between.
        processing_class (or tokenizer): the model's own by default.
        formatting_func: row -> text.
        callbacks: objects with any of on_step_end(trainer, metrics), on_log(trainer, record) and
            on_save(trainer, folder). `trainer.should_stop = True` ends training after the step.
        dataset_text_field, max_seq_length, packing, dataset_num_proc: override args (older notebooks).

    Attributes:
        train_dataset, eval_dataset: tokenised, not packed: columns input_ids and labels (-100 = not trained).
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
        _check_collator(data_collator)
        self.model = _checked_model(model)
        self.args = _resolved_args(
            args,
            model,
            dataset_text_field=dataset_text_field,
            max_length=max_seq_length,
            packing=packing,
            dataset_num_proc=dataset_num_proc,
        )
        self.processing_class = processing_class or tokenizer or model.tokenizer
        self.callbacks = _checked_callbacks(callbacks)
        self.state = TrainerState()
        self.should_stop = False
        self.opt_state: Any = None
        self._train_step: Any = None
        self._evaluated: dict[int, tuple[Dataset, Batches]] = {}
        if eval_dataset is None and (self.args.eval_strategy != "no" or self.args.eval_on_start):
            raise ValueError(f"eval_strategy={self.args.eval_strategy!r} needs an eval_dataset; got None")

        def prepare(data: Any, args: SFTConfig) -> Dataset:
            return prepare_dataset(data, self.processing_class, args, formatting_func)

        self.train_dataset = None if train_dataset is None else prepare(train_dataset, self.args)
        eval_args = dataclasses.replace(self.args, packing=self._eval_packing, shuffle_dataset=False)
        self.eval_dataset: Dataset | dict[str, Dataset] | None = None
        if isinstance(eval_dataset, Mapping):
            self.eval_dataset = {name: prepare(data, eval_args) for name, data in eval_dataset.items()}
        elif eval_dataset is not None:
            self.eval_dataset = prepare(eval_dataset, eval_args)

    @property
    def tokenizer(self) -> Any:
        """Older name of processing_class."""
        return self.processing_class

    @property
    def _eval_packing(self) -> bool:
        return self.args.packing if self.args.eval_packing is None else self.args.eval_packing

    @property
    def compilations(self) -> int:
        """How often the training step was compiled: once for each shape of batch."""
        return 0 if self._train_step is None else self._train_step.compilations

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Train for args.max_steps, or args.num_train_epochs, optimizer steps.

        Args:
            resume_from_checkpoint: a checkpoint-N folder, or True for the newest in output_dir. The run goes
                on bit for bit as if it had not been interrupted. None = args.resume_from_checkpoint.

        Raises:
            FloatingPointError: loss or gradient became non-finite; names the step and the rows.
            KeyboardInterrupt (SIGINT), SystemExit (SIGTERM): after the step is finished and saved.
            ValueError: the checkpoint belongs to a run whose settings or data give another result.
        """
        if self.train_dataset is None:
            raise ValueError("train() needs a train_dataset; got None")
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        began = time.perf_counter()
        resume = checkpoint.find_checkpoint(resume_from_checkpoint, self.args.output_dir)
        run = self._begin(self.train_dataset, resume)
        first = self.state.global_step
        try:
            with StopSignals() as signals:
                self._loop(run, signals)
                self._finish(run, first, time.perf_counter() - began)
        finally:
            run.history.close()
            run.progress.close()
        signals.reraise()
        return TrainOutput(self.state.global_step, self._mean_loss(), self.state.log_history[-1])

    def _loop(self, run: _Run, signals: StopSignals) -> None:
        """The steps. Metrics are read one step late, so the device always has the next step in its queue."""
        self.should_stop = False
        key = jax.random.key(self.args.seed)
        first = self.state.global_step
        if self.args.eval_on_start and first == 0:
            self._evaluate_and_log(run)
        pending = None
        batch = run.batches.step(first) if first < run.num_steps else None
        for n in range(first, run.num_steps):
            self.model.trainable, self.opt_state, metrics = self._train_step(
                self.model.trainable, self.opt_state, self.model.base, batch, jax.random.fold_in(key, n)
            )
            if n + 1 < run.num_steps:
                batch = run.batches.step(n + 1)
            if pending is not None:
                self._count(run, *pending)
            pending = (n, metrics)

            stop = signals.received is not None or self.should_stop
            evaluate, save = self._due("eval", n + 1, run), self._due("save", n + 1, run)
            if evaluate or save or stop or n + 1 == run.num_steps:
                self._count(run, *pending)
                pending = None
                stop = stop or self.should_stop
                if evaluate:
                    self._evaluate_and_log(run)
                if save or stop:
                    self._save_checkpoint(run)
            if stop:
                return

    def _begin(self, dataset: Dataset, resume: Path | None) -> _Run:
        """Make batches, optimizer and step; with `resume`, put everything where that checkpoint was."""
        args, model = self.args, self.model.for_training()
        batches = self._batches(dataset, train=True)
        steps_per_epoch = batches.steps_per_epoch
        num_steps = (
            args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
        )
        warmup = args.num_warmup_steps(num_steps)
        schedule = make_schedule(args.lr_scheduler_type, args.learning_rate, num_steps, warmup)
        optimizer = make_optimizer(args, num_steps, model.trainable)
        self.opt_state = jax.jit(optimizer.init)(model.trainable)  # one program, not one a shape
        norm, noise = args.max_grad_norm, args.neftune_noise_alpha
        self._train_step = PlannedStep(
            lambda remat: make_train_step(
                model, optimizer, max_grad_norm=norm, neftune_alpha=noise, remat=remat
            ),
            model,
            args.remat if args.gradient_checkpointing and model.gradient_checkpointing else "none",
            args.memory_budget_gb,
        )
        fingerprint = checkpoint.fingerprint(args, num_steps, model, dataset)
        self.state = TrainerState(max_steps=num_steps)
        if resume is not None:
            state, written_by = checkpoint.read_state(resume)
            checkpoint.check_fingerprint(written_by, fingerprint, resume)
            model.trainable, self.opt_state = checkpoint.load_checkpoint(
                resume, model.trainable, self.opt_state
            )
            self.state = dataclasses.replace(state, max_steps=num_steps)
        checkpoint.remove_leftovers(args.output_dir)
        existing = checkpoint.checkpoint_steps(args.output_dir)
        if existing and resume is None:
            warnings.warn(
                f"{args.output_dir} holds checkpoints of an earlier run (steps {str(existing)[1:-1]}); this "
                "run starts from step 0 and replaces those that it reaches",
                stacklevel=3,
            )
        return _Run(
            batches=batches,
            num_steps=num_steps,
            learning_rates=np.asarray(jax.vmap(schedule)(jnp.arange(num_steps))),
            fingerprint=fingerprint,
            history=History(args, self.state.log_history),
            progress=Progress(args, self.state.global_step, num_steps),
            speed=Speed(),
            saved=[step for step in existing if resume is not None and step <= self.state.global_step],
        )

    def _batches(self, dataset: Dataset, *, train: bool) -> Batches:
        args = self.args
        packed = args.packing if train else self._eval_packing
        if packed:
            dataset = pack(dataset, args.max_length or self.model.max_seq_length, args.packing_strategy)
        return Batches(
            dataset,
            batch_size=args.per_device_train_batch_size if train else args.per_device_eval_batch_size,
            accumulation=args.gradient_accumulation_steps if train else 1,
            max_length=args.max_length,
            packed=packed,
            seed=args.seed if args.data_seed is None else args.data_seed,
            shuffle=train and args.train_sampling_strategy == "random",
            pad_token_id=self.processing_class.pad_token_id or 0,
        )

    def _count(self, run: _Run, n: int, metrics: Mapping[str, jax.Array]) -> None:
        """Read the metrics of step n (counted from 0), stop if they are not finite, log if it is time."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise FloatingPointError(self._describe_failure(run, n, values))
        self.state.add(values)
        self.state.global_step = n + 1
        self.state.epoch = (n + 1) / run.batches.steps_per_epoch
        run.speed.add(int(values["num_tokens"]))
        speed, memory, rate = run.speed.per_second(), peak_memory_gib(), float(run.learning_rates[n])
        run.progress.step(values["loss"], rate, speed, memory)
        self._call("on_step_end", values)
        if self._due("logging", n + 1, run):
            record = self.state.close_window()
            record |= {"learning_rate": rate, "tokens_per_second": speed, "peak_memory_gib": memory}
            run.speed.restart()
            self._log(run, record)

    def _log(self, run: _Run, record: Record) -> None:
        record = {**record, "epoch": self.state.epoch, "step": self.state.global_step}
        self.state.log_history.append(record)
        run.history.log(record)
        run.progress.log(record)
        self._call("on_log", record)

    def _due(self, kind: Event, done: int, run: _Run) -> bool:
        """Whether to log, evaluate or save after `done` steps."""
        strategy = getattr(self.args, f"{kind}_strategy")
        if strategy == "no":
            return False
        last = done == run.num_steps
        if strategy == "epoch":
            return last or done % run.batches.steps_per_epoch == 0
        if last or (kind == "logging" and done == 1 and self.args.logging_first_step):
            return True
        every = self.args.interval(kind, run.num_steps)
        return every > 0 and done % every == 0

    def _call(self, method: str, argument: Any) -> None:
        for callback in self.callbacks:
            if hasattr(callback, method):
                getattr(callback, method)(self, argument)

    def _mean_loss(self) -> float:
        return self.state.total_loss / max(self.state.global_step, 1)

    def _finish(self, run: _Run, first: int, seconds: float) -> None:
        steps = self.state.global_step - first
        rows = steps * self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        record = {
            "train_runtime": seconds,
            "train_samples_per_second": rows / seconds,
            "train_steps_per_second": steps / seconds,
            "train_loss": self._mean_loss(),
        }
        self._log(run, record)
        title = Path(self.model.name_or_path).name
        plot_losses(self.state.log_history, Path(self.args.output_dir) / "loss.png", title)

    def _describe_failure(self, run: _Run, n: int, values: Mapping[str, float]) -> str:
        """Name step n and the rows of its batch, with their first tokens."""
        batch = run.batches.step(n)
        ids = batch["input_ids"].reshape(-1, batch["input_ids"].shape[-1])  # [G * B, T]
        used = batch["segment_ids"].reshape(ids.shape) > 0
        kind = "packed row" if self.args.packing else "row"
        lines = [
            f"  {kind} {index}: {self.processing_class.decode(row[mask][:24])!r}"
            for index, row, mask in zip(run.batches.rows(n), ids, used, strict=False)  # then come empty rows
        ]
        where = (
            f"{self.args.output_dir}/checkpoint-{run.saved[-1]}" if run.saved else "no checkpoint before it"
        )
        return (
            f"step {n + 1} of {run.num_steps}: loss {values['loss']}, gradient norm {values['grad_norm']}, "
            f"learning rate {run.learning_rates[n]:.3g}. The weights in memory are lost; on disk: {where}. "
            "Lower learning_rate, compute in bfloat16 or float32, or look at the rows of this step:\n"
            + "\n".join(lines)
        )

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
            self._eval_step(self.model.trainable, self.model.base, batch)
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

    def _eval_batches(self, data: Dataset) -> Batches:
        """The batches of an evaluation dataset, packed once."""
        if id(data) not in self._evaluated:
            self._evaluated[id(data)] = (
                data,
                self._batches(data, train=False),
            )  # held, so that no other gets its id
        return self._evaluated[id(data)][1]

    @cached_property
    def _eval_step(self) -> Callable[..., dict[str, jax.Array]]:
        return make_eval_step(self.model)

    def _evaluate_and_log(self, run: _Run) -> None:
        run.speed.pause()
        self._log(run, dict(self.evaluate()))
        run.speed.resume()

    # -- saving ----------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None) -> None:
        """Write the adapter (or fully trained model) and the tokenizer, as PEFT and transformers read it."""
        folder = Path(output_dir or self.args.output_dir)
        self.model.save_pretrained(folder)
        self.processing_class.save_pretrained(folder)

    def _save_checkpoint(self, run: _Run) -> None:
        run.speed.pause()
        step = self.state.global_step
        folder = checkpoint.save_checkpoint(
            self.args.output_dir,
            self.model.trainable,
            self.opt_state,
            self.state,
            run.fingerprint,
            lambda folder: self.save_model(str(folder)),
        )
        run.saved = [*(saved for saved in run.saved if saved != step), step]
        limit = self.args.save_total_limit
        if limit is not None:
            checkpoint.remove_checkpoints(self.args.output_dir, run.saved[:-limit])
            run.saved = run.saved[-limit:]
        self._call("on_save", folder)
        run.speed.resume()


def _refuse(**arguments: Any) -> None:
    advice = {
        "compute_metrics": "the logits that it needs never exist; use model.generate on the evaluation rows",
        "peft_config": "call FastLanguageModel.get_peft_model(model, …) first",
        "optimizers": "set optim, learning_rate and lr_scheduler_type in SFTConfig",
    }
    for name, value in arguments.items():
        if value is not None and value != (None, None):
            raise ValueError(f"SFTTrainer: {name} is not supported; {advice[name]}")


def _check_collator(collator: Any) -> None:
    if collator is None:
        return
    name = type(collator).__name__
    if name not in PADDING_COLLATORS or getattr(collator, "mlm", False):
        raise ValueError(
            f"SFTTrainer: data_collator={name} is not supported; put what it does into the dataset "
            "(columns input_ids and labels are taken as they are)"
        )
    warnings.warn(f"SFTTrainer: data_collator={name} is not needed and not used", stacklevel=3)


def _checked_model(model: Any) -> Model:
    if isinstance(model, Model):
        if not model.trainable:
            raise ValueError(
                "SFTTrainer: nothing to train; call FastLanguageModel.get_peft_model(model, …) first"
            )
        return model
    raise TypeError(
        f"SFTTrainer: model must come from FastLanguageModel.from_pretrained, got {type(model).__name__}"
        + (f" {model!r}" if isinstance(model, str) else "")
    )


def _checked_callbacks(callbacks: Sequence[Any] | None) -> list[Any]:
    for callback in callbacks or ():
        bases = {base.__name__ for base in type(callback).__mro__}
        if "TrainerCallback" in bases or not any(hasattr(callback, name) for name in CALLBACK_METHODS):
            raise TypeError(
                f"callback {type(callback).__name__}: expected an object with some of the methods "
                "on_step_end(trainer, metrics), on_log(trainer, record), on_save(trainer, folder); a "
                "TrainerCallback of transformers has other ones"
            )
    return list(callbacks or ())


def _resolved_args(args: SFTConfig | None, model: Model, **overrides: Any) -> SFTConfig:
    """args with the older keywords put in, and max_length held to what the model was loaded for."""
    if args is not None and not isinstance(args, SFTConfig):
        raise TypeError(
            f"args must be a jaxtune.SFTConfig, got {type(args).__name__}; the argument names are the same"
        )
    args = dataclasses.replace(
        args or SFTConfig(), **{name: value for name, value in overrides.items() if value is not None}
    )
    if args.max_length is not None and args.max_length > model.max_seq_length:
        warnings.warn(
            f"max_length {args.max_length} is more than the model was loaded for; rows are cut at "
            f"{model.max_seq_length} tokens (give from_pretrained a larger max_seq_length for more)",
            stacklevel=3,
        )
        args = dataclasses.replace(args, max_length=model.max_seq_length)
    return args
