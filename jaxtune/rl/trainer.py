"""GRPOTrainer: group relative policy optimisation, as TRL defines it.

    prompts -> rollout -> rewards -> advantages -> log-probabilities -> steps          (collect, then step)

A generation serves several micro-batches and iterations; an optimizer step takes the micro-batches that follow
(data.Plan). The generation that a step is in the middle of is part of a checkpoint, so resuming is exact there too.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jaxtune import cluster
from jaxtune.checkpoint import leaves_checksum
from jaxtune.data.responses import chat_tokenizer, text_tokenizer
from jaxtune.metrics import Record, mean
from jaxtune.model import Model
from jaxtune.models.names import Leaves
from jaxtune.models.remat import Remat
from jaxtune.rl.checks import checked_args, refuse
from jaxtune.rl.collect import Collector, Policy
from jaxtune.rl.completions import CompletionLog
from jaxtune.rl.config import GRPOConfig
from jaxtune.rl.data import GRPOBatches, Plan, Prompts, make_plan, prepare_prompts
from jaxtune.rl.environments import with_environments
from jaxtune.rl.experience import Collator, Experience, blank_rows
from jaxtune.rl.groups import GroupCollator
from jaxtune.rl.image_batches import largest_shapes, planned_shapes, with_images
from jaxtune.rl.images import PromptImages
from jaxtune.rl.losses.grpo import adapted_entropy_coef
from jaxtune.rl.reference import load_reference, mixed, reference_leaves, save_reference
from jaxtune.rl.reward_model import with_models
from jaxtune.rl.reward_runner import RewardRunner
from jaxtune.rl.rollout import Rollout, RolloutFunc
from jaxtune.rl.sources import make_rollout
from jaxtune.rl.step import make_grpo_eval, make_grpo_step, make_score
from jaxtune.rl.tools import with_tools
from jaxtune.step import TrainStep
from jaxtune.training_loop import Run, Trainer, TrainOutput, checked_model

EXPERIENCE_FILE = "experience.npz"
ENTROPY_FILE = "entropy_control.json"
REFERENCE_FILE = "reference.safetensors"
FIRST = ("reward", "reward_std", "loss", "kl", "completions/mean_length")  # in a record
NOT_LOGGED = ("num_tokens", "entropy_sum", "entropy_count")


@dataclasses.dataclass
class EntropyControl:
    """The coefficient of the entropy bonus, and the mean entropy of the last step's tokens."""

    coef: float
    last: float = math.inf


class GRPOTrainer(Trainer[GRPOConfig]):
    """Reinforcement learning with verifiable rewards, with the arguments of TRL's GRPOTrainer.

    Args:
        model: from FastLanguageModel.from_pretrained and, unless full_finetuning, get_peft_model.
        reward_funcs: a function or several, `f(prompts, completions, completion_ids, **columns) -> list`, plain or
            async, see reward_runner; or the name of a reward model, see reward_model.
        args: GRPOConfig.
        train_dataset, eval_dataset: a `datasets.Dataset`, a list of rows, a file or a hub name, with a column "prompt"
            (text or messages); eval_dataset may be a dict of them. The other columns go to the reward functions.
        processing_class (or tokenizer): the model's own by default.
        callbacks: as SFTTrainer's.
        rollout_func: `f(prompts, trainer) -> {"prompt_ids", "completion_ids", "logprobs", …}` in place of the engine;
            see rollout.FunctionRollout.
        tools: functions that the model may call, see tools.ToolRollout; prompts are then messages.
        environment_factory: makes an environment, or a dict of such functions, see environments.
        rollout: a `Rollout` of your own.

    With beta, the reference is the model as it is when the trainer is made: without its adapter where that is new.
    """

    CURVE = ("reward", "weighted sum of the functions")

    def __init__(
        self,
        model: Model,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        tools: Any = None,
        rollout_func: RolloutFunc | None = None,
        environment_factory: Any = None,
        *,
        rollout: Rollout | None = None,
        tokenizer: Any = None,
    ) -> None:
        refuse(
            reward_processing_classes=reward_processing_classes,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        model = checked_model(model, "GRPOTrainer")
        args = checked_args(args).on_devices(model.layout.size)
        processing_class = processing_class or tokenizer or model.processor or model.tokenizer
        text = chat_tokenizer(processing_class)
        self.rollout = rollout or make_rollout(model, args, rollout_func, self)
        tools, own = list(tools or ()), []
        around = (self.rollout, text, tools, args, model.max_seq_length)
        if environment_factory is not None:
            self.rollout = environments = with_environments(*around, environment_factory)
            train_dataset, own = environments.dataset(train_dataset, args), environments.reward_functions()
        elif tools:
            self.rollout = with_tools(*around)
        folder = Path(args.output_dir) / "completions"
        functions = with_models(reward_funcs or (), args.chat_template_kwargs)
        rewards = RewardRunner(functions, folder, args.reward_timeout, own=own)
        if eval_dataset is None and (args.eval_strategy != "no" or args.eval_on_start):
            raise ValueError(f"eval_strategy={args.eval_strategy!r} needs an eval_dataset; got None")

        self._images = images = (
            None if model.processor is None else PromptImages(model, processing_class, args)
        )

        def prepare(data: Any) -> Prompts:
            tokenise, limit = not self.rollout.makes_prompt_ids, model.max_seq_length
            needs = {"tokenise": tokenise, "needs_prompt": environment_factory is None}
            if images is not None and images.concern(data, tools):
                return images.prepare(data, limit=limit, tokenise=tokenise)
            return prepare_prompts(data, text, args, limit=limit, tools=tools, **needs)

        self._prepare = prepare
        self._prompts: Any = None if train_dataset is None else prepare(train_dataset)
        named = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
        self._eval_prompts = (
            {} if eval_dataset is None else {name: prepare(data) for name, data in named.items()}
        )
        rows = None if self._prompts is None else self._prompts.rows
        super().__init__(model, args, rows, eval_dataset, processing_class, callbacks)
        self.reward_funcs, self.reward_func_names = rewards.functions, rewards.names
        self._loss = args.loss_options()
        reference = reference_leaves(model) if args.beta != 0 else None
        self._reference_checksum = None if reference is None else leaves_checksum(reference)
        if args.sync_ref_model and model.lora is not None:
            raise ValueError(
                "sync_ref_model=True needs full_finetuning=True: a reference of adapters is no mixture of models"
            )
        self._collector = self._make_collector(rewards, reference)
        self._completions = self._make_log(rewards.names)
        self._held: dict[int, Experience] = {}
        self._entropy = EntropyControl(args.entropy_coef)
        self._reward = math.nan  # mean of the last generation
        self._stepped = time.perf_counter()

    def _make_log(self, names: Sequence[str]) -> CompletionLog:
        args = self.args
        folder = Path(args.output_dir) / "completions"
        return CompletionLog(folder, names, args.num_completions_to_print, args.log_unique_prompts)

    def _make_collector(self, rewards: RewardRunner, reference: Leaves | None) -> Collector:
        args, tokenizer, model = self.args, text_tokenizer(self.processing_class), self.model
        pad = tokenizer.pad_token_id or 0
        longest = max(
            (data.longest() for data in (self._prompts, *self._eval_prompts.values()) if data), default=0
        )
        limit = (
            min(longest + args.max_completion_length, model.max_seq_length)
            if longest
            else model.max_seq_length
        )
        rows = Collator(limit, pad)
        groups = GroupCollator(longest or limit, args.max_completion_length, pad, args.num_generations)
        ends = {*model.stop_ids(), tokenizer.pad_token_id} - {None}
        devices, part, evaluations = model.layout.size, cluster.part(), self._eval_prompts.values()
        # the loss of an evaluation is computed on one device: its rows need not divide among several
        self._eval_collator = with_images(rows, self._images, lambda: largest_shapes(evaluations, args, 1))
        return Collector(
            args=args,
            tokenizer=tokenizer,
            rollout=self.rollout,
            rewards=rewards,
            weights=rewards.weights(args.reward_weights),
            end_ids=frozenset(ends),
            collator=with_images(
                groups if args.shared_prefix else rows,
                self._images,
                lambda: planned_shapes(self._prompts, self._plan, args, devices),
                devices,
                part,
            ),
            eval_collator=with_images(
                rows, self._images, lambda: largest_shapes(evaluations, args, devices), devices, part
            ),
            policy=Policy(model, make_score(model, args.temperature, layout=model.layout), reference),
            loss=self._loss,
            state=lambda: self.state,
        )

    @cached_property
    def _plan(self) -> Plan:
        return make_plan(self.args, len(self._prompts))

    @property
    def tokenizer(self) -> Any:
        """Older name of processing_class."""
        return self.processing_class

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """As Trainer.train; RewardError and what a rollout raises come through after the last step is saved."""
        self._stepped = time.perf_counter()
        try:
            return super().train(resume_from_checkpoint)
        finally:
            self.rollout.close()
            if self._images is not None:
                self._images.close()

    def _begin(self, resume: Path | None) -> Run:
        run = super()._begin(resume)
        longest = self._prompts.longest()
        if longest:  # of a rollout_func's rows it is not known
            self._say_memory(longest)
        return run

    def _say_memory(self, longest: int) -> None:
        """Compile the step for the longest rows, which says what it takes; and say what the rollouts take.

        Raises:
            MemoryError: the longest rows do not fit.
        """
        rows = self._longest_rows(self.args.per_device_train_batch_size, self._prompts)
        batch = self._collated([(rows, range(len(rows)))] * self._plan.accumulation)
        batch = self.model.layout.put_all_rows(batch, 1)
        arguments = (self.model.trainable, self.opt_state, self.model.base, batch, jax.random.key(0))
        self._train_step.prepare(arguments)
        line = self.rollout.forecast(self._plan.unique, self._plan.group, longest)
        if line and cluster.is_first():
            print(line, flush=True)

    def _longest_rows(self, count: int, prompts: Prompts) -> Experience:
        longest, seen = prompts.longest(), prompts.documents is not None
        completion = min(self.args.max_completion_length, self.model.max_seq_length - longest)
        return blank_rows(count, longest, completion, self.args.per_token, images=seen)

    # -- batches ---------------------------------------------------------------------------------------------

    def _make_batches(self) -> GRPOBatches:
        self._held, self._entropy = {}, EntropyControl(self.args.entropy_coef)
        self._collector.synced = None
        return GRPOBatches(self._plan, self._step_batch)

    def _step_batch(self, number: int) -> dict[str, np.ndarray]:
        """The batch of an optimizer step; makes the generations that start in it."""
        micros = self._plan.micros(number)
        before = self._plan.micros(max(number - 1, 0))[0].generation  # its metrics may not have been read yet
        self._held = {g: held for g, held in self._held.items() if g >= before}
        missing = dict.fromkeys(m.generation for m in micros if m.generation not in self._held)
        for generation in missing:
            self._held[generation] = self._generate(generation)
        if missing:
            self.rollout.pause()
        height = self.args.per_device_train_batch_size
        return self._collated(
            [(self._held[m.generation], range(m.part * height, (m.part + 1) * height)) for m in micros]
        )

    def _collated(self, parts: list[tuple[Experience, Sequence[int]]]) -> dict[str, np.ndarray]:
        """The batch of a step from the rows of its micro-batches."""
        plan, height = self._plan, self.args.per_device_train_batch_size
        empty = plan.accumulation - len(parts)  # the last step of an epoch may be short
        batch = self._collector.collator(parts + [(parts[0][0], ())] * empty, height)
        batch["accumulation"] = np.full(plan.accumulation, len(parts), np.float32)
        if self._has_entropy_bonus:
            active = not self.args.use_adaptive_entropy or self._entropy.last <= self.args.entropy_target
            batch["entropy_coef"] = np.full(plan.accumulation, self._entropy.coef * active, np.float32)
        return batch

    def _generate(self, generation: int) -> Experience:
        experience, samples, metrics = self._collector.train(self._prompts, self._plan, generation)
        self.state.record(metrics)
        self._reward = metrics["reward"]
        if self.args.log_completions and cluster.is_first():
            self._completions.add(samples)
        return experience

    @property
    def _has_entropy_bonus(self) -> bool:
        return self.args.entropy_coef != 0 or self.args.use_adaptive_entropy

    def _prepares_ahead(self, n: int) -> bool:
        starts = any(micro.is_first for micro in self._plan.micros(n))
        return not (starts or self.args.use_adaptive_entropy or self._moves_reference(n))

    def _moves_reference(self, done: int) -> bool:
        return self.args.sync_ref_model and done % self.args.ref_model_sync_steps == 0

    def _count(self, run: Run, n: int, metrics: Mapping[str, jax.Array]) -> None:
        super()._count(run, n, metrics)
        policy = self._collector.policy
        if self._moves_reference(n + 1) and policy.reference is not None:
            policy.reference = mixed(policy.reference, self.model.trainable, self.args.ref_model_mixup_alpha)

    def _batch(self, run: Run, n: int) -> dict[str, Any]:
        try:
            return self.model.layout.put_all_rows(run.batches.step(n), 1)
        except Exception as error:
            if n == self.state.global_step:
                self._save_before(run, error)
            raise

    def _evaluate_and_log(self, run: Run) -> None:
        try:
            super()._evaluate_and_log(run)
        except Exception as error:
            self._save_before(run, error)
            raise

    def _save_before(self, run: Run, error: Exception) -> None:
        """Saves the steps that were done before a reward function or a rollout failed."""
        step = self.state.global_step
        if step and step not in run.saved:
            self._save_checkpoint(run)
            error.add_note(
                f"Training up to step {step} is saved; resume_from_checkpoint=True goes on from there."
            )

    # -- step ------------------------------------------------------------------------------------------------

    def _make_step(self, optimizer: optax.GradientTransformation, remat: Remat) -> TrainStep:
        return make_grpo_step(
            self.model,
            optimizer,
            self._loss,
            temperature=self.args.temperature,
            steps_per_generation=self.args.generation_steps,
            max_grad_norm=self.args.max_grad_norm,
            dropout=not self.args.disable_dropout,
            remat=remat,
            layout=self.model.layout,
        )

    def _rows_per_step(self) -> int:
        return self.args.batch_shape(1)[2]  # args are those of all devices

    def _values(self, n: int, metrics: Mapping[str, np.ndarray]) -> dict[str, Any]:
        count = len(self._plan.micros(n))
        values: dict[str, Any] = {
            name: float(value) if np.ndim(value) == 0 else value[:count] for name, value in metrics.items()
        }
        if self._has_entropy_bonus:
            if self.args.use_adaptive_entropy:
                self._adapt_entropy(values["entropy_sum"].sum() / max(values["entropy_count"].sum(), 1.0))
            values["entropy_coef"] = self._entropy.coef
        now = time.perf_counter()
        values["step_time"], self._stepped = now - self._stepped, now
        return values

    def _adapt_entropy(self, entropy: float) -> None:
        args = self.args
        coef = adapted_entropy_coef(
            self._entropy.coef,
            entropy,
            target=args.entropy_target,
            delta=args.entropy_coef_delta,
            minimum=args.entropy_coef_min,
            maximum=args.entropy_coef_max,
        )
        self._entropy = EntropyControl(float(coef), float(entropy))

    def _figures(self, values: Mapping[str, Any]) -> dict[str, float]:
        return {"reward": self._reward, "loss": values["loss"]}

    def _count_tokens(self, values: Mapping[str, Any]) -> None:
        """Nothing: tokens count when they are made."""

    def _window_record(self, window: Mapping[str, list[float]]) -> Record:
        means: Record = {name: mean(values) for name, values in window.items() if name not in NOT_LOGGED}
        means |= {"grad_norm": window["grad_norm"][-1], "num_tokens": self.state.num_input_tokens_seen}
        self._show_completions("completions")
        return {name: means[name] for name in FIRST if name in means} | means

    def _show_completions(self, kind: str) -> None:
        table = self._completions.flush(self.state.global_step, kind)
        if table:
            print(table, flush=True)

    def _describe_batch(self, run: Run, n: int) -> list[str]:
        height, lines = self.args.per_device_train_batch_size, []
        for micro in self._plan.micros(n):
            held = self._held[micro.generation]
            for i in range(micro.part * height, (micro.part + 1) * height):
                end = self.processing_class.decode(held.completion_ids[i][-48:])
                lines.append(f"  advantage {held.advantages[i]:+.3f}: a completion that ends with {end!r}")
        return lines

    # -- what a checkpoint holds besides ---------------------------------------------------------------------

    def _data_summary(self) -> dict[str, Any]:
        summary = {
            "rows of data": len(self._prompts),
            "data (digest)": self._prompts.digest(),
            "reward functions": self.reward_func_names,
        }
        if self._reference_checksum is not None:
            summary["reference (checksum of a sample)"] = self._reference_checksum
        return summary

    def _write_state(self, folder: Path) -> None:
        following = self._plan.micros(self.state.global_step)[0]
        if not following.is_first:
            self._held[following.generation].save(folder / EXPERIENCE_FILE)
        (folder / ENTROPY_FILE).write_text(json.dumps(dataclasses.asdict(self._entropy)), encoding="utf-8")
        if self.args.sync_ref_model:
            save_reference(folder / REFERENCE_FILE, self._collector.policy.reference)

    def _read_state(self, folder: Path) -> None:
        following = self._plan.micros(self.state.global_step)[0]
        if not following.is_first:
            self._held = {following.generation: Experience.load(folder / EXPERIENCE_FILE)}
        self._entropy = EntropyControl(**json.loads((folder / ENTROPY_FILE).read_text(encoding="utf-8")))
        if self.args.sync_ref_model:
            policy = self._collector.policy
            policy.reference = load_reference(folder / REFERENCE_FILE, policy.reference)

    # -- evaluation ------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Completions of the evaluation data, their rewards and loss; the same random numbers each time.

        Args:
            eval_dataset: what the trainer takes, instead of its own.

        Returns:
            eval_loss, eval_reward, eval_rewards/<function>/mean, … as in training, and eval_runtime (seconds); for a
            dict of datasets each with its name: eval_<name>_reward.
        """
        prompts = self._eval_prompts
        if eval_dataset is not None:
            named = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
            prompts = {name: self._prepare(data) for name, data in named.items()}
        if not prompts:
            raise ValueError(
                "evaluate() needs an eval_dataset, here or in GRPOTrainer(eval_dataset=…); got None"
            )
        results: dict[str, float] = {}
        for name, data in prompts.items():
            prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
            results |= {f"{prefix}_{key}": value for key, value in self._evaluated(data).items()}
        self.rollout.pause()
        self._show_completions("eval_completions")
        return results

    def _evaluated(self, prompts: Prompts) -> dict[str, Any]:
        began = time.perf_counter()
        group, height = self.args.group(train=False), self.args.per_device_eval_batch_size
        if height % group:
            raise ValueError(
                f"per_device_eval_batch_size={height} must be a multiple of the {group} completions of each prompt"
            )
        gathered: dict[str, list[float]] = {}
        for first in range(0, len(prompts), height // group):
            numbers = range(first, min(first + height // group, len(prompts)))
            experience, samples, metrics = self._collector.evaluation(prompts, numbers)
            prompts.begin(n + len(numbers) for n in numbers if n + len(numbers) < len(prompts))
            loss = jax.device_get(self._eval_step(*self._eval_arguments(experience)))
            for name, value in {**metrics, **loss}.items():
                gathered.setdefault(name, []).append(float(value))
            if self.args.log_completions and cluster.is_first():
                self._completions.add(samples)
        record = {name: mean(values) for name, values in gathered.items() if name not in NOT_LOGGED}
        return {**record, "runtime": time.perf_counter() - began}

    def _eval_arguments(self, rows: Experience) -> tuple[Leaves, Leaves, dict[str, Any]]:
        batch = self._eval_collator([(rows, range(len(rows)))], len(rows))
        batch = jax.tree.map(lambda x: x[0], batch)
        batch["accumulation"] = np.float32(1)
        if self._has_entropy_bonus:
            batch["entropy_coef"] = np.float32(self._entropy.coef)
        one = self.model.on_one_device()
        return one.trainable, one.base, batch

    def _largest_evaluations(self) -> Iterator[tuple[Any, tuple]]:
        for prompts in self._eval_prompts.values():
            count = min(self.args.per_device_eval_batch_size, len(prompts) * self.args.group(train=False))
            if prompts.longest():  # of a rollout_func's rows it is not known
                yield self._eval_step, self._eval_arguments(self._longest_rows(count, prompts))

    @cached_property
    def _eval_step(self) -> Callable[..., dict[str, jax.Array]]:
        return make_grpo_eval(self.model, self._loss, temperature=self.args.temperature)
