"""Completions in an environment: each has one of its own, whose methods are tools for the model.

    class Game:
        def reset(self, **row) -> str | None: …   # called before each completion; a text is put behind the prompt
        def guess(self, number: int) -> str: …    # every other public method is a tool
        def get_reward(self) -> float: …          # may be there: one more reward, of weight 1

Environments are made once and used again after a reset. With {name: factory} the column "environment" of a row says
which one it is for; its tools alone are shown. The contract is TRL's.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtune.rl.config import GRPOConfig
from jaxtune.rl.data import NO_PROMPT, Prompt, prompt_ids
from jaxtune.rl.rollout import Completions, Request, Rollout
from jaxtune.rl.tools import ToolRollout

Factory = Callable[[], Any]
COLUMN = "environment"
_NOT_TOOLS = ("reset", "get_reward")


class EnvironmentRollout:
    """Another source of completions, in environments.

    Args:
        loop: makes the turns; its own tools are there in every environment.
        tokenizer: its chat template takes tools and messages of the role "tool".
        factories: makes an environment, or several by name.
        tools: of the loop.
        template_kwargs: for the chat template.
        limit: most tokens of prompt and completion together.

    Raises:
        TypeError: a factory is no function. ValueError: an environment has no reset.
    """

    makes_prompt_ids = True

    def __init__(
        self,
        loop: ToolRollout,
        tokenizer: Any,
        factories: Factory | Mapping[str, Factory],
        tools: Sequence[Callable[..., Any]],
        *,
        template_kwargs: dict[str, Any],
        limit: int,
    ):
        self._loop, self._tokenizer, self._tools = loop, tokenizer, list(tools)
        self._template_kwargs, self._limit = template_kwargs, limit
        self._many = isinstance(factories, Mapping)
        self._factories: dict[Any, Factory] = (
            dict(factories) if isinstance(factories, Mapping) else {None: factories}
        )
        for factory in self._factories.values():
            if not callable(factory):
                raise TypeError(
                    "environment_factory: expected a function or class that makes an environment, or a dict of them, "
                    f"got {factory!r:.60}"
                )
        # The first of each is made now: it says what its tools are.
        self._pool = {name: [factory()] for name, factory in self._factories.items()}
        for (first,) in self._pool.values():
            if "reset" not in _methods(first):
                raise ValueError(f"environment_factory: {type(first).__name__} has no method reset(**row)")

    def reward_functions(self) -> list[Callable[..., Any]]:
        """A reward function for each class of environments that has get_reward, with its name."""
        kinds = dict.fromkeys(type(first) for (first, *_) in self._pool.values())
        return [
            _reward_function(kind) for kind in kinds if inspect.isfunction(getattr(kind, "get_reward", None))
        ]

    def dataset(self, data: Any, args: GRPOConfig) -> Any:
        """The training data, or, where environments say what is asked, rows without a prompt for one generation.

        Raises:
            ValueError: there are rows to give, or a number of steps.
        """
        if data is not None:
            return data
        if self._many:
            raise ValueError(
                "environment_factory with several environments needs a train_dataset with a column 'environment'"
            )
        if args.max_steps < 1:
            raise ValueError("without a train_dataset, max_steps has to say how long to train")
        return [{"prompt": NO_PROMPT}] * (args.generation_rows // args.num_generations)

    def sync(self, step: int) -> None:
        self._loop.sync(step)

    def pause(self) -> None:
        self._loop.pause()

    def forecast(self, groups: int, group: int, prompt: int) -> str:
        return self._loop.forecast(groups, group, prompt)

    def close(self) -> None:
        self._loop.close()

    def generate(self, request: Request) -> Completions:
        """Completions, each in an environment that was reset for it.

        Raises:
            ValueError: a row names no environment, or a prompt is too long or is text.
        """
        if request.seen is not None:
            raise ValueError(
                "environment_factory: rows with images are not supported; leave one of the two out"
            )
        names = [row.get(COLUMN) if self._many else None for row in request.rows]
        environments = self._drawn(names)
        prompts = []
        for environment, row in zip(environments, request.rows, strict=True):
            values = {name: value for name, value in row.items() if not (self._many and name == COLUMN)}
            prompts.append(_with_observation(row.get("prompt", NO_PROMPT), environment.reset(**values)))
        tools = [[*self._tools, *_tools(environment)] for environment in environments]
        ids = [self._prompt_ids(*one) for one in zip(prompts, tools, strict=True)]
        room = min(request.max_new_tokens, self._limit - max(map(len, ids)))
        if room < 1:
            raise ValueError(
                f"a prompt with what its environment says has {max(map(len, ids))} tokens, the model was loaded for "
                f"{self._limit} of prompt and completion; give from_pretrained a larger max_seq_length"
            )
        first = request.first * request.group
        following = Request(prompts, ids, 1, request.seed, room, first=first)
        made = self._loop.converse(following, tools)
        return dataclasses.replace(made, prompts=prompts, environments=environments)

    def _drawn(self, names: Sequence[str | None]) -> list[Any]:
        """An environment for each completion."""
        used: dict[str | None, int] = {}
        drawn = []
        for name in names:
            if name not in self._pool:
                raise ValueError(
                    f"a row has environment={name!r}, which is not among those of environment_factory: "
                    f"{', '.join(map(str, self._factories))}"
                )
            pool, number = self._pool[name], used.get(name, 0)
            if number == len(pool):
                pool.append(self._factories[name]())
            drawn.append(pool[number])
            used[name] = number + 1
        return drawn

    def _prompt_ids(self, prompt: Prompt, tools: Sequence[Callable[..., Any]]) -> list[int]:
        kwargs = self._template_kwargs | ({"tools": list(tools)} if tools else {})
        return prompt_ids([prompt], self._tokenizer, kwargs)[0]


def _methods(environment: Any) -> list[str]:
    """Names of the methods, found on the class: looking at the object would evaluate its properties."""
    return [name for name, _ in inspect.getmembers(type(environment), predicate=inspect.isfunction)]


def _tools(environment: Any) -> list[Callable[..., Any]]:
    names = [name for name in _methods(environment) if name not in _NOT_TOOLS and not name.startswith("_")]
    return [getattr(environment, name) for name in names]


def _with_observation(prompt: Prompt, observation: Any) -> Prompt:
    """A prompt with what reset returned behind its last message."""
    if isinstance(prompt, str):
        raise ValueError(
            "environment_factory needs prompts of messages, [{'role': 'user', 'content': …}]; the data has text"
        )
    if observation is None:
        return prompt
    content = prompt[-1]["content"]
    if isinstance(observation, list) and any(part.get("type") != "text" for part in observation):
        raise ValueError("environment_factory: reset returned images, which are not supported; return a text")
    if isinstance(observation, list) and isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if isinstance(observation, str) and isinstance(content, list):
        observation = [{"type": "text", "text": observation}]
    return [*prompt[:-1], {**prompt[-1], "content": content + observation}]


def _reward_function(kind: type) -> Callable[..., Any]:
    """get_reward of the environments of a class; None for those of others."""
    if inspect.iscoroutinefunction(kind.get_reward):

        async def get_reward(environments: Sequence[Any], **_: Any) -> list[float | None]:
            return [await one.get_reward() if type(one) is kind else None for one in environments]

    else:

        def get_reward(environments: Sequence[Any], **_: Any) -> list[float | None]:
            return [one.get_reward() if type(one) is kind else None for one in environments]

    get_reward.__name__ = kind.__name__
    return get_reward


def with_environments(
    rollout: Rollout,
    tokenizer: Any,
    tools: Sequence[Callable[..., Any]],
    args: GRPOConfig,
    limit: int,
    factories: Factory | Mapping[str, Factory],
) -> EnvironmentRollout:
    """A source of completions, in environments, with tools besides.

    Raises:
        ValueError: it makes its own prompts. TypeError: what is given is no function.
    """
    if rollout.makes_prompt_ids:
        raise ValueError("give environment_factory or rollout_func, not both")
    kwargs, turns = args.chat_template_kwargs or {}, args.max_tool_calling_iterations
    loop = ToolRollout(rollout, tokenizer, tools, turns=turns, template_kwargs=kwargs, limit=limit)
    return EnvironmentRollout(loop, tokenizer, factories, tools, template_kwargs=kwargs, limit=limit)
