"""Calls reward functions with TRL's contract, and says what went wrong where one fails.

    f(prompts=…, completions=…, completion_ids=…, trainer_state=…, log_extra=…, log_metric=…, **columns) -> list

Every column of the dataset but prompt, completion and completion_ids comes along. The list has one number a completion;
None says that the function does not apply. `async def` functions run side by side.
"""

import asyncio
import dataclasses
import functools
import inspect
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.rl.apart import apart

RewardFunction = Callable[..., Any]
NOT_COLUMNS = ("prompt", "completion", "completion_ids")


class RewardError(RuntimeError):
    """A reward function failed; says which, on what, and where the completions are kept."""


@dataclasses.dataclass(frozen=True)
class Rewards:
    """values: float32 [N, F], NaN = not applicable. extra: columns of log_extra. metrics: means of log_metric."""

    values: np.ndarray
    extra: dict[str, list[Any]]
    metrics: dict[str, float]


class RewardRunner:
    """Reward functions with their names and their time limit.

    Args:
        functions: callables with TRL's contract, plain or async.
        folder: where completions are kept that a function failed on.
        timeout: seconds that one call may take; None: any. The call then runs in a thread of its own, which goes on
            by itself when its time is up.
        own: functions of environments, behind the others.

    Raises:
        TypeError: something that is no function, such as a torch module.
    """

    def __init__(
        self,
        functions: RewardFunction | Sequence[RewardFunction],
        folder: Path,
        timeout: float | None = None,
        *,
        own: Sequence[RewardFunction] = (),
    ):
        given = [functions] if callable(functions) else list(functions)
        self.functions: list[RewardFunction] = [*given, *own]
        self._given = len(given)
        if not self.functions:
            raise ValueError(
                "reward_funcs is empty; expected at least one function, or an environment with get_reward"
            )
        for function in self.functions:
            if not callable(function) or hasattr(function, "state_dict"):
                raise TypeError(
                    f"reward_funcs: expected functions (prompts, completions, **columns) -> list of numbers, got "
                    f"{type(function).__name__} {function!r:.60}; for a reward model give its name or a RewardModel"
                )
        self.names = [_name(function) for function in self.functions]
        self._folder, self._timeout = Path(folder), timeout

    def weights(self, given: Sequence[float] | None) -> np.ndarray:
        """Of each function, float32 [F]; those of environments have 1.

        Raises:
            ValueError: there are more or fewer than functions.
        """
        if given is not None and len(given) != self._given:
            raise ValueError(
                f"reward_weights has {len(given)} numbers for {self._given} reward functions "
                f"({', '.join(self.names[: self._given])})"
            )
        own = [1.0] * (len(self.functions) - self._given)
        return np.asarray([*([1.0] * self._given if given is None else given), *own], np.float32)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[list[int]],
        columns: Mapping[str, list[Any]],
        state: Any,
    ) -> Rewards:
        """Rewards of N completions.

        Args:
            prompts, completions: texts, or messages. completion_ids: their tokens.
            columns: the dataset's, one value a completion.
            state: of the trainer.

        Raises:
            RewardError: a function raised, took too long, or returned something else than N numbers.
        """
        extra: dict[str, list[Any]] = {}
        logged: dict[str, list[float]] = {}
        rows = {name: list(values) for name, values in columns.items() if name not in NOT_COLUMNS}
        rows |= {
            "prompts": list(prompts),
            "completions": list(completions),
            "completion_ids": list(completion_ids),
        }
        tools = {
            "trainer_state": state,
            "log_extra": lambda column, values: extra.setdefault(column, []).extend(values),
            "log_metric": lambda name, value: logged.setdefault(name, []).append(value),
        }
        values = np.full((len(prompts), len(self.functions)), np.nan, np.float32)
        for place, returned in self._run_all(rows, tools).items():
            values[:, place] = self._numbers(place, returned, rows)
        self._warn_of_unscorable(values, rows)
        for column, cells in extra.items():
            if len(cells) != len(prompts):
                raise self._failure(
                    f"log_extra({column!r}) got {len(cells)} values for {len(prompts)} completions", rows
                )
        return Rewards(values, extra, {name: float(np.mean(numbers)) for name, numbers in logged.items()})

    def _run_all(self, rows: dict[str, list[Any]], tools: dict[str, Any]) -> dict[int, Any]:
        """What each function returned, by its place."""
        returned, waiting = {}, []
        for place, function in enumerate(self.functions):
            if _is_async(function):
                waiting.append(place)
                continue
            try:
                returned[place] = _limited(functools.partial(function, **rows, **tools), self._timeout)
            except Exception as error:
                raise self._explained(place, error, rows, tools) from error
        if waiting:

            async def one(place: int) -> Any:
                try:
                    return await asyncio.wait_for(self.functions[place](**rows, **tools), self._timeout)
                except Exception as error:
                    raise self._explained(place, error, rows, tools) from error

            async def together() -> list[Any]:
                return await asyncio.gather(*map(one, waiting))

            returned |= dict(zip(waiting, apart(lambda: asyncio.run(together())), strict=True))
        return returned

    def _numbers(self, place: int, returned: Any, rows: dict[str, list[Any]]) -> np.ndarray:
        """A function's list as float32 [N], None as NaN."""
        name, count = self.names[place], len(rows["prompts"])
        if isinstance(returned, (str, Mapping)) or not hasattr(returned, "__len__"):
            got = f"{type(returned).__name__} {returned!r:.60}"
            raise self._failure(
                f"reward function {name!r} returned {got}, expected a list of {count} numbers", rows
            )
        if len(returned) != count:
            raise self._failure(
                f"reward function {name!r} returned {len(returned)} rewards, expected {count}, one for each completion",
                rows,
            )
        out = np.full(count, np.nan, np.float32)
        for i, value in enumerate(returned):
            if value is None:
                continue
            try:
                out[i] = float(value)
            except (TypeError, ValueError) as error:
                got = f"reward {i} of function {name!r} is {value!r:.60}, expected a number or None"
                raise self._failure(f"{got} ({_described(rows, i)})", rows) from error
            if math.isinf(out[i]):
                raise self._failure(
                    f"reward {i} of function {name!r} is {value!r} ({_described(rows, i)})", rows
                )
        return out

    def _explained(
        self, place: int, error: Exception, rows: dict[str, list[Any]], tools: dict[str, Any]
    ) -> RewardError:
        """The error of a function, with the row that it fails on alone."""
        name = self.names[place]
        if isinstance(error, TimeoutError) and self._timeout is not None:
            return self._failure(
                f"reward function {name!r} took longer than reward_timeout={self._timeout} seconds for "
                f"{len(rows['prompts'])} completions",
                rows,
            )
        kind = f"reward function {name!r} raised {type(error).__name__}: {error}"
        for i in range(len(rows["prompts"])):
            alone = {column: [values[i]] for column, values in rows.items()}
            if self._fails(place, alone, tools, type(error)):
                return self._failure(f"{kind} (on {_described(rows, i)})", rows)
        return self._failure(f"{kind} (on no single row alone)", rows)

    def _fails(
        self, place: int, rows: dict[str, list[Any]], tools: dict[str, Any], kind: type[Exception]
    ) -> bool:
        function = functools.partial(self.functions[place], **rows, **tools)
        try:
            if _is_async(self.functions[place]):
                apart(lambda: asyncio.run(asyncio.wait_for(function(), self._timeout)))
            else:
                _limited(function, self._timeout)
        except kind:
            return True
        return False

    def _failure(self, message: str, rows: dict[str, list[Any]]) -> RewardError:
        """An error that says where the completions are kept."""
        self._folder.mkdir(parents=True, exist_ok=True)
        taken = {path.name for path in self._folder.glob("failed_*.jsonl")}
        path = self._folder / next(
            name for n in range(10**6) if (name := f"failed_{n:03d}.jsonl") not in taken
        )
        with path.open("w", encoding="utf-8") as file:
            for i in range(len(rows["prompts"])):
                row = {column: values[i] for column, values in rows.items()}
                file.write(json.dumps(row, ensure_ascii=False, default=repr) + "\n")
        return RewardError(f"{message}. All {len(rows['prompts'])} completions are kept in {path}")

    def _warn_of_unscorable(self, values: np.ndarray, rows: dict[str, list[Any]]) -> None:
        none = np.flatnonzero(np.isnan(values).all(axis=1))
        if none.size:
            warnings.warn(
                f"every reward function returned None for {none.size} of {len(values)} completions: they teach "
                "nothing; "
                f"first {_described(rows, int(none[0]))}",
                stacklevel=3,
            )


def _described(rows: Mapping[str, list[Any]], i: int) -> str:
    return f"row {i}: prompt {_short(rows['prompts'][i])}, completion {_short(rows['completions'][i])}"


def _short(value: Any, length: int = 300) -> str:
    """Text, or the last message's text, shortened in the middle."""
    text = value if isinstance(value, str) else value[-1].get("content") if value else ""
    text = text if isinstance(text, str) else json.dumps(text, default=repr)
    return repr(text if len(text) <= length else f"{text[: length // 2]} … {text[-length // 2 :]}")


def _name(function: RewardFunction) -> str:
    """As TRL names it; a partial has the name of what it calls."""
    if isinstance(function, functools.partial):
        return _name(function.func)
    return getattr(function, "__name__", type(function).__name__)


def _is_async(function: RewardFunction) -> bool:
    inner = function.func if isinstance(function, functools.partial) else function
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(getattr(inner, "__call__", None))  # noqa: B004


def _limited(call: Callable[[], Any], timeout: float | None) -> Any:
    """The result of a call; TimeoutError where it is not there in time."""
    return call() if timeout is None else apart(call, timeout)
