"""The host loop around a pure training step, which every trainer shares. Read `train`, then `_loop`.

A step computes; everything here is bookkeeping: which batch, which key, when to log, evaluate and save. The random key
is a function of (seed, step), and what else decides a step is in the checkpoint, so resuming is going on at step n.
"""

import abc
import dataclasses
import math
import signal
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtune import checkpoint, cluster
from jaxtune.budget import PlannedStep, check_evaluation
from jaxtune.config import Event, TrainingConfig
from jaxtune.data import Batches, VisionBatches
from jaxtune.metrics import History, Progress, Record, Speed, TrainerState, peak_memory_gib, plot_curves
from jaxtune.model import Model
from jaxtune.models.remat import Remat
from jaxtune.optim import make_optimizer, make_schedule
from jaxtune.signals import SIGNALS, StopSignals
from jaxtune.step import TrainStep

CALLBACK_METHODS = ("on_step_end", "on_log", "on_save")


class TrainOutput(NamedTuple):
    """What train() returns: steps done, mean loss over all of them, run time and speed."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class StepBatches(Protocol):
    """Where a loop gets the batch of step n, counted from 0 over all epochs."""

    @property
    def steps_per_epoch(self) -> int: ...

    def step(self, number: int, /) -> dict[str, Any]: ...


@dataclasses.dataclass
class Run:
    """What one call of train() works with."""

    batches: Any  # StepBatches, of the trainer's own kind
    num_steps: int
    learning_rates: np.ndarray  # [num_steps]
    fingerprint: dict[str, Any]
    history: History
    progress: Progress
    speed: Speed
    saved: list[int]  # steps of the checkpoints that belong to this run, oldest first


class Trainer[Config: TrainingConfig](abc.ABC):
    """The loop; a trainer says what its batches, its step and its evaluation are.

    Attributes:
        state: global_step, epoch, log_history, as in Hugging Face's Trainer.
        should_stop: set it to True, for instance in a callback, and training ends after the step.
    """

    CURVE: ClassVar[tuple[str, str]] = ("loss", "nats per token")  # what is drawn at the end, and its unit

    def __init__(
        self,
        model: Model,
        args: Config,
        train_dataset: Any,
        eval_dataset: Any,
        processing_class: Any,
        callbacks: Sequence[Any] | None,
    ) -> None:
        """Args as they are used: datasets prepared, args resolved. callbacks: see SFTTrainer."""
        self.model, self.args = model, args
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.processing_class = processing_class
        self.callbacks = checked_callbacks(callbacks)
        self.state = TrainerState()
        self.should_stop = False
        self.opt_state: Any = None
        self._train_step: Any = None

    # -- what a trainer says ---------------------------------------------------------------------------------

    @abc.abstractmethod
    def _make_batches(self) -> StepBatches:
        """The batches of the training data."""

    @abc.abstractmethod
    def _make_step(self, optimizer: optax.GradientTransformation, remat: Remat) -> TrainStep:
        """The jitted step."""

    @abc.abstractmethod
    def _data_summary(self) -> dict[str, Any]:
        """What of the data decides the result, for the fingerprint of a checkpoint: JSON values."""

    @abc.abstractmethod
    def _describe_batch(self, run: Run, n: int) -> Sequence[str]:
        """A line for each row of step n."""

    @abc.abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Figures of the evaluation data."""

    def _largest_evaluations(self) -> Iterable[tuple[Any, tuple]]:
        """For each evaluation dataset the jitted program and its arguments, the last of them its largest batch."""
        return ()

    def _prepares_ahead(self, n: int) -> bool:
        """Whether the batch of step n can be made before the metrics of step n - 1 are read."""
        return True

    def _batch(self, run: Run, n: int) -> dict[str, Any]:
        return self.model.layout.put_rows(run.batches.step(n), 1)

    @abc.abstractmethod
    def _window_record(self, window: Mapping[str, list[float]]) -> Record:
        """What is logged of the metrics of every step since the last log."""

    def _figures(self, values: Mapping[str, Any]) -> dict[str, float]:
        """What the progress bar shows of a step."""
        return {"loss": values["loss"]}

    def _rows_per_step(self) -> int:
        return self.args.batch_shape(self.model.layout.size)[2]

    def _count_tokens(self, values: Mapping[str, Any]) -> None:
        self.state.num_input_tokens_seen += int(values["num_tokens"])

    def _end(self, run: Run) -> None:  # noqa: B027
        """Free what only training needs, also after an error."""

    def _write_state(self, folder: Path) -> None:  # noqa: B027
        """Put into a checkpoint what else step n + 1 depends on."""

    def _read_state(self, folder: Path) -> None:  # noqa: B027
        """Take it from there."""

    # -- the loop --------------------------------------------------------------------------------------------

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
        run = self._begin(resume)
        first = self.state.global_step
        try:
            with StopSignals(SIGNALS if cluster.part()[1] == 1 else [signal.SIGINT]) as signals:
                self._loop(run, signals)
                self._finish(run, first, time.perf_counter() - began)
        finally:
            run.history.close()
            run.progress.close()
            self._end(run)
        signals.reraise()
        return TrainOutput(self.state.global_step, self._mean_loss(), self.state.log_history[-1])

    def _loop(self, run: Run, signals: StopSignals) -> None:
        """The steps. Metrics are read one step late, so the device always has the next step in its queue."""
        self.should_stop = False
        key = jax.random.key(self.args.seed)
        first = self.state.global_step
        self._plan_evaluation()
        if self.args.eval_on_start and first == 0:
            self._evaluate_and_log(run)
        pending = batch = None
        for n in range(first, run.num_steps):
            self.model.trainable, self.opt_state, metrics = self._train_step(
                self.model.trainable,
                self.opt_state,
                self.model.base,
                self._batch(run, n) if batch is None else batch,
                jax.random.fold_in(key, n),
            )
            ahead = n + 1 < run.num_steps and self._prepares_ahead(n + 1)
            batch = self._batch(run, n + 1) if ahead else None
            if pending is not None:
                self._count(run, *pending)
            pending = (n, metrics)

            if cluster.is_preempted(n):
                signals.received = signal.SIGTERM
            stop = signals.received is not None or self.should_stop
            evaluate, save = self._due("eval", n + 1, run), self._due("save", n + 1, run)
            if evaluate or save or stop or not ahead:
                self._count(run, *pending)
                pending = None
                stop = stop or self.should_stop
                if evaluate:
                    self._evaluate_and_log(run)
                if save or stop:
                    self._save_checkpoint(run)
            if stop:
                return

    def _begin(self, resume: Path | None) -> Run:
        """Make batches, optimizer and step; with `resume`, put everything where that checkpoint was."""
        args, model = self.args, self.model.for_training()
        batches = self._make_batches()
        steps_per_epoch = batches.steps_per_epoch
        num_steps = (
            args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
        )
        warmup = args.num_warmup_steps(num_steps)
        schedule = make_schedule(args.lr_scheduler_type, args.learning_rate, num_steps, warmup)
        optimizer = make_optimizer(args, num_steps, model.trainable)
        model.trainable = model.layout.put_leaves(model.module, model.trainable)
        initial = jax.jit(
            optimizer.init, out_shardings=model.layout.sharding()
        )  # one program, not one a shape
        self.opt_state = initial(model.trainable)
        self._train_step = PlannedStep(
            lambda remat: self._make_step(optimizer, remat),
            model,
            self._remat(),
            args.memory_budget_gb,
            layout=model.layout,
        )
        fingerprint = checkpoint.fingerprint(args, num_steps, model, self._data_summary())
        self.state = TrainerState(max_steps=num_steps)
        if resume is not None:
            state, written_by = checkpoint.read_state(resume)
            checkpoint.check_fingerprint(written_by, fingerprint, resume)
            model.trainable, self.opt_state = checkpoint.load_checkpoint(
                resume, model.trainable, self.opt_state
            )
            self.state = dataclasses.replace(state, max_steps=num_steps)
            self._read_state(resume)
        if cluster.is_first():
            checkpoint.remove_leftovers(args.output_dir)
        existing = checkpoint.checkpoint_steps(args.output_dir)
        if existing and resume is None:
            warnings.warn(
                f"{args.output_dir} holds checkpoints of an earlier run (steps {str(existing)[1:-1]}); this "
                "run starts from step 0 and replaces those that it reaches",
                stacklevel=3,
            )
        return Run(
            batches=batches,
            num_steps=num_steps,
            learning_rates=np.asarray(jax.vmap(schedule)(jnp.arange(num_steps))),
            fingerprint=fingerprint,
            history=History(args, self.state.log_history, writes=cluster.is_first()),
            progress=Progress(args, self.state.global_step, num_steps, speaks=cluster.is_first()),
            speed=Speed(),
            saved=[step for step in existing if resume is not None and step <= self.state.global_step],
        )

    def _remat(self) -> str:
        """What args say; what the model says where they say nothing."""
        args = self.args
        said = args.remat != "auto" or args.memory_budget_gb is not None
        return (
            args.remat
            if args.gradient_checkpointing and (self.model.gradient_checkpointing or said)
            else "none"
        )

    def _plan_evaluation(self) -> None:
        """Compile what evaluations will run, to know before the first step that it fits.

        Raises:
            MemoryError: it does not fit args.memory_budget_gb.
        """
        if self.args.eval_strategy == "no" and not self.args.eval_on_start:
            return
        for program, arguments in self._largest_evaluations():
            compiled = program.lower(*arguments).compile()  # the program's own calls find it
            check_evaluation(compiled, arguments, self.opt_state, self.args.memory_budget_gb)

    def _count(self, run: Run, n: int, metrics: Mapping[str, jax.Array]) -> None:
        """Read the metrics of step n (counted from 0), stop if they are not finite, log if it is time."""
        values = self._values(n, jax.device_get(metrics))
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise FloatingPointError(self._describe_failure(run, n, values))
        self.state.add(values)
        self._count_tokens(values)
        self.state.global_step = n + 1
        self.state.epoch = (n + 1) / run.batches.steps_per_epoch
        run.speed.add(int(values["num_tokens"]))
        speed, memory, rate = run.speed.per_second(), peak_memory_gib(), float(run.learning_rates[n])
        run.progress.step(self._figures(values), rate, speed, memory)
        self._call("on_step_end", values)
        if self._due("logging", n + 1, run):
            record = self._window_record(self.state.close_window())
            record |= {"learning_rate": rate, "tokens_per_second": speed, "peak_memory_gib": memory}
            run.speed.restart()
            self._log(run, record)

    def _log(self, run: Run, record: Record) -> None:
        record = {**record, "epoch": self.state.epoch, "step": self.state.global_step}
        self.state.log_history.append(record)
        run.history.log(record)
        run.progress.log(record)
        self._call("on_log", record)

    def _due(self, kind: Event, done: int, run: Run) -> bool:
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

    def _finish(self, run: Run, first: int, seconds: float) -> None:
        steps = self.state.global_step - first
        rows = steps * self._rows_per_step()
        record = {
            "train_runtime": seconds,
            "train_samples_per_second": rows / seconds,
            "train_steps_per_second": steps / seconds,
            "train_loss": self._mean_loss(),
        }
        self._log(run, record)
        if not cluster.is_first():
            return
        title = Path(self.model.name_or_path).name
        name, unit = self.CURVE
        path = Path(self.args.output_dir) / f"{name}.png"
        plot_curves(self.state.log_history, path, title, name=name, unit=unit)

    def _values(self, n: int, metrics: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The metrics of step n as floats, or arrays with one value a micro-batch."""
        return {name: float(value) for name, value in metrics.items()}

    def _describe_failure(self, run: Run, n: int, values: Mapping[str, float]) -> str:
        """Name step n and the rows of its batch."""
        where = (
            f"{self.args.output_dir}/checkpoint-{run.saved[-1]}" if run.saved else "no checkpoint before it"
        )
        return (
            f"step {n + 1} of {run.num_steps}: loss {values['loss']}, gradient norm {values['grad_norm']}, "
            f"learning rate {run.learning_rates[n]:.3g}. The weights in memory are lost; on disk: {where}. "
            "Lower learning_rate, compute in bfloat16 or float32, or look at the rows of this step:\n"
            + "\n".join(self._describe_batch(run, n))
        )

    def _evaluate_and_log(self, run: Run) -> None:
        run.speed.pause()
        self._log(run, dict(self.evaluate()))
        run.speed.resume()

    # -- saving ----------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None) -> None:
        """Write the adapter (or fully trained model) and the tokenizer, as PEFT and transformers read it."""
        folder = Path(output_dir or self.args.output_dir)
        if not cluster.is_first():
            return
        model = self.model.on_one_device() if self.model.full_finetuning else self.model
        model.save_pretrained(folder)
        self.processing_class.save_pretrained(folder)

    def _save_checkpoint(self, run: Run) -> None:
        run.speed.pause()
        step = self.state.global_step
        folder = checkpoint.save_checkpoint(
            self.args.output_dir,
            self.model.trainable,
            self.opt_state,
            self.state,
            run.fingerprint,
            self._write_checkpoint_files,
        )
        run.saved = [*(saved for saved in run.saved if saved != step), step]
        limit = self.args.save_total_limit
        if limit is not None and cluster.is_first():
            checkpoint.remove_checkpoints(self.args.output_dir, run.saved[:-limit])
        run.saved = run.saved if limit is None else run.saved[-limit:]
        self._call("on_save", folder)
        run.speed.resume()

    def _write_checkpoint_files(self, folder: Path) -> None:
        self.save_model(str(folder))
        self._write_state(folder)


def checked_model(model: Any, trainer: str) -> Model:
    if isinstance(model, Model):
        if not model.trainable:
            raise ValueError(
                f"{trainer}: nothing to train; call FastLanguageModel.get_peft_model(model, …) first"
            )
        return model
    raise TypeError(
        f"{trainer}: model must come from FastLanguageModel.from_pretrained, got {type(model).__name__}"
        + (f" {model!r}" if isinstance(model, str) else "")
    )


def within_model(max_length: int | None, model: Model) -> int | None:
    """max_length in tokens, held to what the model was loaded for."""
    if max_length is None or max_length <= model.max_seq_length:
        return max_length
    warnings.warn(
        f"max_length {max_length} is more than the model was loaded for: {model.max_seq_length} tokens count as the "
        "limit of a row (give from_pretrained a larger max_seq_length for more)",
        stacklevel=4,
    )
    return model.max_seq_length


def largest_eval_batch(batches: Batches | VisionBatches) -> dict[str, Any]:
    """The largest of `eval_batches`, where those are the steps of one micro-batch each."""
    if isinstance(batches, VisionBatches):
        step = batches.step(batches.largest_step)
        batches.close()  # the steps after it were begun
    else:
        step = batches.step(max(range(batches.steps_per_epoch), key=batches.step_length))
    return jax.tree.map(lambda array: array[0], step)


def checked_callbacks(callbacks: Sequence[Any] | None) -> list[Any]:
    for callback in callbacks or ():
        bases = {base.__name__ for base in type(callback).__mro__}
        if "TrainerCallback" in bases or not any(hasattr(callback, name) for name in CALLBACK_METHODS):
            raise TypeError(
                f"callback {type(callback).__name__}: expected an object with some of the methods "
                "on_step_end(trainer, metrics), on_log(trainer, record), on_save(trainer, folder); a "
                "TrainerCallback of transformers has other ones"
            )
    return list(callbacks or ())
