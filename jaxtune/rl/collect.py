"""Making experience: prompts -> completions -> rewards -> advantages -> log-probabilities."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxtune import cluster
from jaxtune.images import check_row
from jaxtune.models.names import Leaves
from jaxtune.rl.advantages import ZERO_STD, Advantages, compute_advantages
from jaxtune.rl.config import GRPOConfig
from jaxtune.rl.data import NO_PROMPT, Plan, Prompts, is_conversational
from jaxtune.rl.experience import Experience, Sample
from jaxtune.rl.image_batches import Collators
from jaxtune.rl.losses.grpo import sampling_metrics
from jaxtune.rl.losses.options import GRPOLossOptions
from jaxtune.rl.reference import without_adapter
from jaxtune.rl.reward_runner import RewardRunner
from jaxtune.rl.rollout import Completions, Request, Rollout
from jaxtune.rl.step import Score
from jaxtune.rl.tools import parsed_message
from jaxtune.rl.vllm_rollout import check_adapter, check_gap

Metrics = dict[str, Any]
_advantages = jax.jit(compute_advantages, static_argnames=("group", "scale_rewards", "aggregation"))
_sampling = jax.jit(sampling_metrics, static_argnames="options")
GAP = "sampling/sampling_logp_difference/mean"
EVALUATION = 2**31  # the random stream of evaluations, which no generation has


@dataclasses.dataclass
class Policy:
    """The model as the collector sees it: its leaves now, and those of the reference (None: without its adapter)."""

    model: Any
    score: Score
    reference: Leaves | None

    def log_probs(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        return self._scored(self.model.trainable, self.model.base, batch)

    def ref_log_probs(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        if self.reference is not None:
            return self._scored(self.reference, self.model.base, batch)
        return self._scored(self.model.trainable, without_adapter(self.model.base), batch)

    def _scored(self, trainable: Leaves, base: Leaves, batch: dict[str, np.ndarray]) -> np.ndarray:
        layout = self.model.layout
        return np.asarray(
            self.score(layout.put_leaves(self.model.module, trainable), base, layout.put_all_rows(batch, 1))
        )


@dataclasses.dataclass
class Collector:
    """Turns prompts into experience.

    weights: of the reward functions, float32 [F]. end_ids: tokens that end a completion, and the padding token.
    state: the trainer's state, now. synced: the step whose model the rollout has.
    """

    args: GRPOConfig
    tokenizer: Any
    rollout: Rollout
    rewards: RewardRunner
    weights: np.ndarray
    end_ids: frozenset[int]
    collator: Collators
    eval_collator: Collators
    policy: Policy
    loss: GRPOLossOptions
    state: Callable[[], Any]
    synced: int | None = None
    _warned: bool = False  # of vLLM's log-probabilities

    def train(
        self, prompts: Prompts, plan: Plan, generation: int
    ) -> tuple[Experience, list[Sample], Metrics]:
        """Experience of one generation in the order of training, its samples, and TRL's metrics of it."""
        numbers = plan.prompts(generation)
        samples, metrics = self._samples(prompts, numbers, plan.group, self._seed(generation, 0))
        prompts.begin(_own_part(plan.prompts(generation + 1))[0])  # while this one is scored and trained on
        found = self._advantages(samples, plan.group)
        metrics |= self._reward_metrics(found) | _length_metrics(samples)
        self.state().num_input_tokens_seen += sum(len(s.prompt_ids) + sum(s.own) for s in samples)
        if self.args.max_resample_rounds:
            samples, more = self._resampled(samples, prompts, plan, generation)
            found, metrics = self._advantages(samples, plan.group), metrics | more
        for sample, advantage in zip(samples, np.asarray(found.values), strict=True):
            sample.advantage = float(advantage)
        order = plan.row_order(generation)
        experience, more = self._scored(
            [samples[i] for i in order], self.args.per_device_train_batch_size, self.collator
        )
        return experience, samples, metrics | more

    def evaluation(
        self, prompts: Prompts, numbers: Sequence[int]
    ) -> tuple[Experience, list[Sample], Metrics]:
        """The same of one batch of an evaluation."""
        group = self.args.group(train=False)
        samples, metrics = self._samples(prompts, numbers, group, self._seed(EVALUATION, int(numbers[0])))
        found = self._advantages(samples, group)
        for sample, advantage in zip(samples, np.asarray(found.values), strict=True):
            sample.advantage = float(advantage)
        experience, more = self._scored(samples, self.args.per_device_eval_batch_size, self.eval_collator)
        return experience, samples, metrics | self._reward_metrics(found) | _length_metrics(samples) | more

    def _seed(self, generation: int, attempt: int) -> int:
        entropy = [self.args.seed, generation, attempt]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0]) & 0x7FFFFFFF

    def _samples(
        self, prompts: Prompts, numbers: Sequence[int], group: int, seed: int
    ) -> tuple[list[Sample], Metrics]:
        """Rewarded completions of some prompts, `group` of each together; and what reward functions logged. On several
        hosts each makes those of its part of the prompts, and then all have all."""
        own, first = _own_part(numbers)
        made = cluster.gathered(lambda: self._own_samples(prompts, own, group, seed, first))
        metrics: dict[str, list[float]] = {}
        for _, logged in made:
            for name, value in logged.items():
                metrics.setdefault(name, []).append(value)
        samples = [sample for part, _ in made for sample in part]
        return samples, {name: float(np.mean(values)) for name, values in metrics.items()}

    def _own_samples(
        self, prompts: Prompts, numbers: Sequence[int], group: int, seed: int, first: int
    ) -> tuple[list[Sample], Metrics]:
        """Those of prompts of which the first is number `first` of the request of all processes."""
        if not len(numbers):
            return [], {}
        step = self.state().global_step
        if self.synced != step:
            self.rollout.sync(step)
            self.synced = step
        each = [int(i) for i in numbers for _ in range(group)]
        prompts.begin(dict.fromkeys(each))
        distinct = {i: prompts.rows[i] for i in dict.fromkeys(each)}
        rows = [dict(distinct[i]) for i in each]
        documents = None if prompts.documents is None else [prompts.documents[i] for i in each]
        request = Request(
            prompts=[row.get("prompt", NO_PROMPT) for row in rows],
            prompt_ids=None if prompts.ids is None else [prompts.ids[i] for i in each],
            group=group,
            seed=seed,
            max_new_tokens=self.args.max_completion_length,
            seen=prompts.seen(each),
            rows=rows,
            first=first,
        )
        made = self.rollout.generate(request)
        _check(made, prompts, request)
        prompts_made = made.prompts or request.prompts
        for i, row in enumerate(rows):
            row |= {name: values[i] for name, values in made.extra.items()}
        completions = self._decoded(made, request)
        names = dict.fromkeys(name for row in rows for name in row)  # some rows may have no images
        columns = {name: [row.get(name) for row in rows] for name in names}
        if made.environments is not None:
            columns["environments"] = made.environments
        rewards = self.rewards(prompts_made, completions, made.completion_ids, columns, self.state())
        samples = [
            Sample(
                row=row,
                prompt=prompts_made[i],
                completion=completions[i],
                prompt_ids=made.prompt_ids[i],
                completion_ids=made.completion_ids[i],
                log_probs=None if made.logprobs is None else made.logprobs[i],
                own=[1] * len(made.completion_ids[i]) if made.tool_mask is None else made.tool_mask[i],
                ended=bool(made.completion_ids[i]) and made.completion_ids[i][-1] in self.end_ids,
                rewards=rewards.values[i],
                extra={column: values[i] for column, values in rewards.extra.items()},
                document=None if documents is None else documents[i],
            )
            for i, row in enumerate(rows)
        ]
        return samples, {**rewards.metrics, **made.metrics}

    def _decoded(self, made: Completions, request: Request) -> list[Any]:
        if made.messages is not None:
            return made.messages
        if is_conversational(request.prompts[0]):
            pairs = zip(made.completion_ids, made.prompt_ids, strict=True)
            return [[parsed_message(self.tokenizer, ids, prompt)] for ids, prompt in pairs]
        return self.tokenizer.batch_decode(made.completion_ids, skip_special_tokens=True)

    def _advantages(self, samples: list[Sample], group: int) -> Advantages:
        return _advantages(
            np.stack([sample.rewards for sample in samples]),
            self.weights,
            group=group,
            scale_rewards=self.args.scale_rewards,
            aggregation=self.args.multi_objective_aggregation,
        )

    def _reward_metrics(self, found: Advantages) -> Metrics:
        metrics = {
            name: float(getattr(found, name)) for name in ("reward", "reward_std", "frac_reward_zero_std")
        }
        for i, name in enumerate(self.rewards.names):
            metrics[f"rewards/{name}/mean"] = float(found.function_mean[i])
            metrics[f"rewards/{name}/std"] = float(found.function_std[i])
        return metrics

    def _resampled(
        self, samples: list[Sample], prompts: Prompts, plan: Plan, generation: int
    ) -> tuple[list[Sample], Metrics]:
        """DAPO's dynamic sampling: groups whose rewards are all equal give way to groups of other prompts."""
        rounds = replaced = 0
        for attempt in range(1, self.args.max_resample_rounds + 1):
            flat = self._flat_groups(samples, plan.group)
            if not flat:
                break
            rounds = attempt
            numbers = plan.other_prompts(generation, attempt, len(flat))
            new, _ = self._samples(prompts, numbers, plan.group, self._seed(generation, attempt))
            self.state().num_input_tokens_seen += sum(len(s.prompt_ids) + sum(s.own) for s in new)
            useless = set(self._flat_groups(new, plan.group))
            useful = [g for g in range(len(flat)) if g not in useless]
            for place, g in zip(flat, useful, strict=False):
                samples[place * plan.group : (place + 1) * plan.group] = new[
                    g * plan.group : (g + 1) * plan.group
                ]
            replaced += len(useful)
        left = len(self._flat_groups(samples, plan.group)) / plan.unique
        return samples, {"resample/rounds": rounds, "resample/groups": replaced, "resample/left": left}

    def _flat_groups(self, samples: list[Sample], group: int) -> list[int]:
        """Groups without a signal: rewards all equal, or fewer than two that say anything."""
        found = _advantages(np.stack([s.rewards for s in samples]), self.weights, group=group)
        std = np.asarray(found.std)[::group]
        return np.flatnonzero(~(std > ZERO_STD)).tolist()

    def _scored(self, samples: list[Sample], height: int, collator: Collators) -> tuple[Experience, Metrics]:
        """Experience in the order of the samples, with the log-probabilities that its training needs."""
        args = self.args
        masks = [
            np.asarray(s.own, np.float32) * (0 if args.mask_truncated_completions and not s.ended else 1)
            for s in samples
        ]
        experience = Experience(
            prompt_ids=[np.asarray(s.prompt_ids, np.int32) for s in samples],
            completion_ids=[np.asarray(s.completion_ids, np.int32) for s in samples],
            advantages=np.asarray([s.advantage for s in samples], np.float32),
            num_items=float(sum(mask.sum() for mask in masks)),
            per_token={"mask": masks},
            documents=None
            if samples[0].document is None
            else np.asarray([s.document for s in samples], np.int64),
        )
        metrics: Metrics = {}
        if args.needs_old_log_probs:
            experience.per_token["old_log_probs"] = _score(
                experience, height, collator, self.policy.log_probs
            )
        if args.beta != 0:
            experience.per_token["ref_log_probs"] = _score(
                experience, height, collator, self.policy.ref_log_probs
            )
        if args.corrects_sampler or (
            args.off_policy_mask_threshold is not None and samples[0].log_probs is not None
        ):
            experience.per_token["sampling_log_probs"] = _sampler_log_probs(samples)
        if args.corrects_sampler:
            metrics = self._sampling_metrics(experience)
        elif args.use_vllm and samples[0].log_probs is not None:
            metrics = self._first_rows_gap(experience, samples, height, collator)
        if args.use_vllm and GAP in metrics:
            if metrics[GAP] > args.vllm_logprob_warning / 2:
                self._check_adapter(experience, samples, height, collator)
            correct = "; vllm_importance_sampling_correction=True corrects for the difference"
            advice = "" if args.corrects_sampler else correct
            self._warned |= check_gap(metrics[GAP], args, advice=advice, warn=not self._warned)
        return experience, metrics

    def _check_adapter(
        self, experience: Experience, samples: list[Sample], height: int, collator: Collators
    ) -> None:
        """Raises VLLMError where the first rows are the reference's completions rather than the policy's."""
        rows, gaps = experience.first(height), []
        sampled = np.concatenate(_sampler_log_probs(samples[:height]))
        own = np.concatenate(rows.per_token["mask"]) > 0
        for function in (self.policy.log_probs, self.policy.ref_log_probs):
            found = np.concatenate(_score(rows, height, collator, function))
            gaps.append(float(np.abs(found - sampled)[own].mean()) if own.any() else 0.0)
        check_adapter(*gaps)

    def _first_rows_gap(
        self, experience: Experience, samples: list[Sample], height: int, collator: Collators
    ) -> Metrics:
        """|Δ log p| of sampler and trainer on the first rows, where training itself needs neither."""
        rows = experience.first(height)
        rows.per_token["old_log_probs"] = _score(rows, height, collator, self.policy.log_probs)
        rows.per_token["sampling_log_probs"] = _sampler_log_probs(samples[:height])
        found = self._sampling_metrics(rows)
        return {name: value for name, value in found.items() if "logp_difference" in name}

    def _sampling_metrics(self, experience: Experience) -> Metrics:
        """TRL's sampling/*; nothing of the difference where the sampler's log-probabilities are not known."""
        names = ("old_log_probs", "sampling_log_probs", "mask")
        old, sampling, mask = (_padded(experience.per_token[name]) for name in names)
        found: Metrics = {
            name: float(value) for name, value in _sampling(old, sampling, mask, self.loss).items()
        }
        if not np.isfinite(sampling[mask > 0]).any():
            found = {name: value for name, value in found.items() if "logp_difference" not in name}
        return found


def _own_part(numbers: Sequence[int] | np.ndarray) -> tuple[np.ndarray, int]:
    """The part of these that this process sees to, and how many come before it."""
    index, count = cluster.part()
    parts = np.array_split(np.asarray(numbers), count)
    return parts[index], sum(map(len, parts[:index]))


def _score(
    experience: Experience,
    height: int,
    collator: Collators,
    function: Callable[[dict[str, np.ndarray]], np.ndarray],
) -> list[np.ndarray]:
    """Of every completion's tokens, [C] a row."""
    parts = [
        range(first, min(first + height, len(experience))) for first in range(0, len(experience), height)
    ]
    batch = collator([(experience, part) for part in parts], height)
    needed = batch.keys() - {"advantages", "num_items", "old_log_probs"}
    found = function({name: batch[name] for name in needed})
    return [
        row
        for part, values in zip(parts, found, strict=True)
        for row in collator.unpad(values, experience, part)
    ]


def _padded(rows: list[np.ndarray]) -> np.ndarray:
    """Rows [C] as one array of few widths, 0 behind their ends."""
    width = 1 << (max(map(len, rows)) - 1).bit_length()
    return np.stack([np.pad(row, (0, width - len(row))) for row in rows])


def _sampler_log_probs(samples: list[Sample]) -> list[np.ndarray]:
    if any(sample.log_probs is None for sample in samples):
        raise ValueError(
            "correcting for the sampler (importance_sampling_correction) needs its log-probabilities; rollout_func "
            "returned logprobs=None"
        )
    return [np.asarray(sample.log_probs, np.float32) for sample in samples]


def _length_metrics(samples: list[Sample]) -> Metrics:
    lengths = np.asarray([sum(sample.own) for sample in samples])
    ended = lengths[[sample.ended for sample in samples]]
    metrics = {"completions/clipped_ratio": 1 - len(ended) / len(lengths)}
    for kind, values in (("length", lengths), ("terminated_length", ended if len(ended) else np.zeros(1))):
        for name in ("mean", "min", "max"):
            metrics[f"completions/{name}_{kind}"] = float(getattr(values, name)())
    return metrics


def _check(made: Completions, prompts: Prompts, request: Request) -> None:
    """Raises where a row has nothing to be predicted from, or a prompt's tokens are without its images' places."""
    if prompts.images is not None and request.seen is not None and request.prompt_ids is None:
        for i, (ids, seen) in enumerate(zip(made.prompt_ids, request.seen, strict=True)):
            try:
                check_row(prompts.images.family, np.asarray(ids), seen.row)
            except ValueError as error:
                raise ValueError(f"prompt_ids of completion {i}: {error}") from error
    for i, ids in enumerate(made.prompt_ids):
        if len(ids) == 0:
            raise ValueError(
                f"the prompt of completion {i} has no tokens, so that its first token has nothing to be predicted from "
                f"(completion ids {json.dumps(made.completion_ids[i][:20])})"
            )
