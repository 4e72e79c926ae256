"""Reward functions with TRL's contract, and what is said when one fails."""

import asyncio
import functools
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from jaxtune.rl.reward_runner import RewardError, RewardRunner

PROMPTS = ["one", "two", "three"]
COMPLETIONS = ["1", "22", "x"]
COLUMNS = {"prompt": PROMPTS, "answer": [1, 2, 3], "completion_ids": ["not", "this", "column"]}


def run(functions, tmp_path, timeout=None):
    runner = RewardRunner(functions, tmp_path, timeout)
    return runner(PROMPTS, COMPLETIONS, [[1], [2, 2], [3]], COLUMNS, "state")


def length(completions, **_):
    return [len(text) for text in completions]


def test_arguments_and_values(tmp_path):
    given = {}

    def sees(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, answer):
        given.update(prompts=prompts, ids=completion_ids, state=trainer_state, answer=answer)
        log_extra("found", ["a", "b", "c"])
        log_metric("share", 0.25)
        log_metric("share", 0.75)
        return [0.5, None, True]

    async def slow(answer, **_):
        await asyncio.sleep(0)
        return np.asarray(answer)

    runner = RewardRunner([sees, slow, functools.partial(length)], tmp_path)
    assert runner.names == ["sees", "slow", "length"]
    found = runner(PROMPTS, COMPLETIONS, [[1], [2, 2], [3]], COLUMNS, "state")
    np.testing.assert_array_equal(
        found.values, np.asarray([[0.5, 1, 1], [np.nan, 2, 2], [1, 3, 1]], np.float32)
    )
    assert given == {"prompts": PROMPTS, "ids": [[1], [2, 2], [3]], "state": "state", "answer": [1, 2, 3]}
    assert found.extra == {"found": ["a", "b", "c"]} and found.metrics == {"share": 0.5}


def test_async_functions_run_side_by_side_also_inside_a_loop(tmp_path):
    async def first(completions, **_):
        await asyncio.sleep(0.2)
        return [1.0] * len(completions)

    async def second(completions, **_):
        await asyncio.sleep(0.2)
        return [2.0] * len(completions)

    async def notebook():
        return run([first, second], tmp_path)

    began = time.perf_counter()
    assert asyncio.run(notebook()).values.tolist() == [[1, 2]] * 3
    assert time.perf_counter() - began < 0.39


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_function_that_raises_is_named_with_its_row(kind, tmp_path):
    def number(completions, **_):
        return [float(text) for text in completions]

    async def async_number(completions, **_):
        return [float(text) for text in completions]

    function = number if kind == "sync" else async_number
    with pytest.raises(RewardError) as caught:
        run([length, function], tmp_path)
    message = str(caught.value)
    assert message.startswith(
        f"reward function {function.__name__!r} raised ValueError: could not convert string"
    )
    assert "(on row 2: prompt 'three', completion 'x')" in message
    kept = Path(message.split("All 3 completions are kept in ")[1])
    assert json.loads(kept.read_text().splitlines()[2]) == {
        "answer": 3, "prompts": "three", "completions": "x", "completion_ids": [3],
    }  # fmt: skip
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_function_that_fails_on_all_rows_only(tmp_path):
    def needs_one(completions, **_):
        if len(completions) > 1:
            raise KeyError("many")
        return [1.0]

    with pytest.raises(RewardError, match="KeyError: 'many' \\(on no single row alone\\)"):
        run(needs_one, tmp_path)


@pytest.mark.parametrize("returned, message", [
    ([1.0, 2.0], "returned 2 rewards, expected 3, one for each completion"),
    (1.0, "returned float 1.0, expected a list of 3 numbers"),
    ("abc", "returned str 'abc', expected a list of 3 numbers"),
    ([1, "a", 2], "reward 1 of function 'fixed' is 'a', expected a number or None (row 1: prompt 'two'"),
    ([1, 2, float("inf")], "reward 2 of function 'fixed' is inf"),
])  # fmt: skip
def test_returns_that_are_no_rewards(returned, message, tmp_path):
    def fixed(**_):
        return returned

    with pytest.raises(RewardError) as caught:
        run(fixed, tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_function_that_hangs_is_given_up(kind, tmp_path):
    def hangs(completions, **_):
        time.sleep(5)

    async def hangs_async(completions, **_):
        await asyncio.sleep(5)

    began = time.perf_counter()
    with pytest.raises(RewardError, match=r"took longer than reward_timeout=0\.2 seconds for 3 completions"):
        run(hangs if kind == "sync" else hangs_async, tmp_path, timeout=0.2)
    assert time.perf_counter() - began < 2
    assert run(length, tmp_path, timeout=5).values.tolist() == [[1], [2], [1]]


def test_rows_that_no_function_scores(tmp_path):
    with pytest.warns(UserWarning, match="None for 1 of 3 completions.*row 1: prompt 'two'"):
        found = run(lambda **_: [1, None, 2], tmp_path)
    assert np.isnan(found.values[1, 0])


def test_what_is_no_function(tmp_path):
    with pytest.raises(TypeError, match=r"got Linear .*for a reward model give its name or a RewardModel"):
        RewardRunner([torch.nn.Linear(1, 1)], tmp_path)
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        RewardRunner([], tmp_path)
