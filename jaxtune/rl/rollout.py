"""Where completions come from: the embedded engine, a user's rollout_func, or anything that is a `Rollout`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import numpy as np

from jaxtune.data.image_encoder import EncodedPrompt
from jaxtune.generate import Engine, Sampling, plan
from jaxtune.generate.weights import merged_bytes
from jaxtune.model import Model
from jaxtune.rl.config import GRPOConfig
from jaxtune.rl.data import Prompt

RolloutFunc = Callable[[list[Prompt], Any], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Request:
    """Completions that are wanted.

    prompts: each `group` times, the same ones together. prompt_ids: their tokens, None where a Rollout makes them.
    seed: decides every random number, with a prompt's place, which is counted from `first`: on several hosts each makes
    a part of the prompts. max_new_tokens: of a completion. seen: each prompt with its images; None where no prompt has
    any. rows: of the dataset, one for each prompt.
    """

    prompts: list[Prompt]
    prompt_ids: list[list[int]] | None
    group: int
    seed: int
    max_new_tokens: int
    seen: list[EncodedPrompt] | None = None
    rows: Sequence[Mapping[str, Any]] = ()
    first: int = 0


@dataclasses.dataclass(frozen=True)
class Completions:
    """What came, in the order of a request's prompts.

    prompt_ids: tokens before the completion. completion_ids: with the token that ended it, without padding.
    logprobs: of each token, what the sampler gave it before top-k, top-p and min-p (NaN: not known); None: not given.
    tool_mask: 1 where the model wrote the token; None: everywhere. extra: further columns for the reward functions.
    messages: of each completion, where it is more than one of the assistant. metrics: to log. prompts: where they are
    others than those of the request. environments: that each completion was made in, for the reward functions.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    logprobs: list[list[float]] | None = None
    tool_mask: list[list[int]] | None = None
    extra: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    messages: list[list[dict[str, Any]]] | None = None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    prompts: list[Prompt] | None = None
    environments: list[Any] | None = None


class Rollout(Protocol):
    """A source of completions.

    makes_prompt_ids: whether it turns prompts into tokens itself.
    """

    makes_prompt_ids: bool

    def sync(self, step: int) -> None:
        """Called before completions are made, whenever `step` optimizer steps have changed the model since."""
        ...

    def generate(self, request: Request) -> Completions:
        """Completions of the model as it was at the last `sync`."""
        ...

    def pause(self) -> None:
        """Gives back memory that training needs; the next call takes it again."""
        ...

    def forecast(self, groups: int, group: int, prompt: int) -> str:
        """A line on the memory that such a request will take, prompts of at most so many tokens; "" where not known."""
        ...

    def close(self) -> None:
        """Frees what is held; called when training ends, also by an error."""
        ...


@dataclasses.dataclass(frozen=True)
class ChosenSampling:
    """How completions are sampled: GRPOConfig's arguments, and its generation_kwargs over them.

    seed: is added to that of a request. stop_strings: texts that end a completion too.
    """

    sampling: Sampling
    max_new_tokens: int
    seed: int
    stop_strings: tuple[str, ...]


def chosen_sampling(args: GRPOConfig) -> ChosenSampling:
    """The sampling that a configuration asks for."""
    chosen = {
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "min_p": args.min_p or 0.0,
        "repetition_penalty": args.repetition_penalty,
    }
    given: dict[str, Any] = dict(args.generation_kwargs or {})
    most = min(args.max_completion_length, given.pop("max_new_tokens", args.max_completion_length))
    seed, stop_strings = given.pop("seed", 0), given.pop("stop_strings", ())
    return ChosenSampling(Sampling(do_sample=True, **(chosen | given)), most, seed, stop_strings)


class EngineRollout:
    """The embedded engine, one on each device: each answers its part of the prompts."""

    makes_prompt_ids = False

    def __init__(self, model: Model, args: GRPOConfig):
        self._model = model
        self._devices = model.layout.own_devices
        self._engines = [
            Engine(model, weights=args.rollout_weights, progress=False, device=i)
            for i in range(len(self._devices))
        ]
        self._chosen = chosen_sampling(args)

    def sync(self, step: int) -> None:
        for engine in self._engines:
            engine.sync()

    def generate(self, request: Request) -> Completions:
        assert request.prompt_ids is not None
        prompts = request.prompt_ids[:: request.group]
        images = None if request.seen is None else [one.row for one in request.seen[:: request.group]]
        everything = np.arange(len(prompts))

        def answers(part: np.ndarray, engine: Engine) -> list[Any]:
            made = engine.generate(
                [prompts[i] for i in part],
                n=request.group,
                sampling=self._chosen.sampling,
                max_new_tokens=min(request.max_new_tokens, self._chosen.max_new_tokens),
                seed=request.seed + self._chosen.seed,
                stop_strings=self._chosen.stop_strings,
                streams=[(request.first + int(i), 0) for i in part],
                images=None if images is None else [images[i] for i in part],
            )
            return list(made)

        def on(device: jax.Device, part: np.ndarray, engine: Engine) -> list[Any]:
            with jax.default_device(device):
                return answers(part, engine) if len(part) else []

        count = len(self._engines)
        if count == 1:
            made = answers(everything, self._engines[0])
        else:
            with ThreadPoolExecutor(count) as pool:
                found = pool.map(on, self._devices, np.array_split(everything, count), self._engines)
            made = [one for part in found for one in part]
        return Completions(
            prompt_ids=request.prompt_ids,
            completion_ids=[one.token_ids for one in made],
            logprobs=[list(map(float, one.logprobs)) for one in made],
        )

    def pause(self) -> None:
        self.close()  # the copy of the weights: the next policy's is another one

    def forecast(self, groups: int, group: int, prompt: int) -> str:
        columns, own = (
            plan.bucket(prompt, plan.PROMPT_COLUMNS),
            plan.bucket(self._chosen.max_new_tokens, plan.OWN_COLUMNS),
        )
        groups = -(-groups // len(self._engines))
        need = self._engines[0].forecast(plan.bucket(groups), group, columns, own).total
        return (
            f"{groups} x {group} completions of {self._chosen.max_new_tokens} tokens: {need / 1e9:.1f} GB, in waves "
            f"where less is free; a merged copy of the weights: {merged_bytes(self._model) / 1e9:.1f} GB"
        )

    def close(self) -> None:
        for engine in self._engines:
            engine.close()


class FunctionRollout:
    """A user's rollout_func(prompts, trainer), with TRL's contract.

    It returns a dict of prompt_ids, completion_ids and logprobs (or None), one of each for every prompt, and may return
    env_mask (0 where a token is not the model's own); what else it returns goes to the reward functions.
    """

    makes_prompt_ids = True

    def __init__(self, function: RolloutFunc, trainer: Any):
        self._function, self._trainer = function, trainer

    def sync(self, step: int) -> None:
        """Nothing: the function reads the trainer's model."""

    def pause(self) -> None:
        """Nothing is held."""

    def forecast(self, groups: int, group: int, prompt: int) -> str:
        return ""

    def generate(self, request: Request) -> Completions:
        made = dict(self._function(list(request.prompts), self._trainer))
        missing = {"prompt_ids", "completion_ids", "logprobs"} - made.keys()
        if missing:
            raise ValueError(
                f"rollout_func must return {', '.join(sorted(missing))} too; it gave {', '.join(made)}"
            )
        count = len(request.prompts)
        masks, logprobs = made.pop("env_mask", None), made.pop("logprobs")
        out = Completions(
            prompt_ids=_lists("prompt_ids", made.pop("prompt_ids"), count),
            completion_ids=_lists("completion_ids", made.pop("completion_ids"), count),
            logprobs=None if logprobs is None else _lists("logprobs", logprobs, count),
            tool_mask=None if masks is None else _lists("env_mask", masks, count),
            extra={
                name: value if isinstance(value, list) else [value] * count for name, value in made.items()
            },
        )
        for name in ("logprobs", "tool_mask"):
            _check_lengths(name, getattr(out, name), out.completion_ids)
        return out

    def close(self) -> None:
        """Nothing is held."""


def _lists(name: str, values: Sequence[Any], count: int) -> list[list[Any]]:
    if len(values) != count:
        raise ValueError(
            f"rollout_func returned {len(values)} {name}, expected {count}, one for each prompt given"
        )
    return [[float("nan") if item is None else item for item in value] for value in values]


def _check_lengths(name: str, values: list[list[Any]] | None, completions: list[list[int]]) -> None:
    for i, (value, ids) in enumerate(zip(values or [], completions, strict=False)):
        if len(value) != len(ids):
            raise ValueError(
                f"rollout_func: completion {i} has {len(ids)} tokens and {len(value)} values of {name}; expected one a "
                "token"
            )
