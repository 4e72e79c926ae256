"""The built-in reward functions against TRL's own."""

import doctest
import pickle
import sys
import threading

import pytest

from jaxtune.rl import rewards

THOUGHTS = [
    "<think>why</think> so",
    "<think>\nlines\n</think>\nand lines",
    "<think>twice<think>nested</think></think>",
    "<think>a</think><think>b</think>",
    "before <think>why</think>",
    "\n<think>after a line</think>",
    "<think>never closed",
    "no closing\n<think>later line</think>",
    "<think></think>",
    "",
]
ANSWERS = [
    (r"My answer is \boxed{\frac{1}{3}}", r"\frac{1}{3}"),
    (r"My answer is \boxed{\frac{1}{2}}", r"$\frac{1}{3}$"),
    (r"\boxed{0.5}", "$1/2$"),
    (r"so $x = 4$ and \boxed{4\text{ cm}}", "$4$"),
    ("The answer is 7", "$7$"),  # no LaTeX
    (r"</think> \boxed{7}", "nothing to parse"),
    (r"<think>\boxed{1}</think> then \boxed{2}", "$2$"),
    (r"<think>\boxed{2}", "$2$"),
    (r"<think>a</think> \boxed{3} </think> \boxed{2}", "$2$"),
    (r"a</answer> <think>b</think> \boxed{(1,2]}", "$(1,2]$"),
]


def messages(texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("trl.rewards")


def test_think_format(theirs):
    got = rewards.think_format_reward(completions=messages(THOUGHTS), prompts=None)
    assert got == theirs.think_format_reward(messages(THOUGHTS))
    assert 0 < sum(got) < len(got)


@pytest.mark.parametrize(("n", "penalty"), [(1, -1.0), (2, -0.5), (3, 0.0)])
def test_repetition_penalty(theirs, n, penalty):
    ids = [[], [1], [1, 2, 3, 4], [5] * 5, [1, 2, 1, 2, 1, 2], [3, 3]]
    ours, reference = (room.get_repetition_penalty_reward(n, penalty) for room in (rewards, theirs))
    assert ours(completion_ids=ids, prompts=None) == reference(ids)
    assert ours.__name__ == reference.__name__


@pytest.mark.parametrize("cache", [0, 20])
def test_soft_overlong_punishment(theirs, cache):
    ids = [[1] * length for length in (0, 79, 80, 81, 90, 100, 101)]
    ours, reference = (room.get_soft_overlong_punishment(100, cache) for room in (rewards, theirs))
    assert ours(completion_ids=ids) == reference(ids)
    assert ours.__name__ == reference.__name__


def test_a_positive_penalty_is_refused():
    with pytest.raises(ValueError, match="0 or below, got 1"):
        rewards.get_repetition_penalty_reward(max_penalty=1)


def test_examples():
    assert doctest.testmod(rewards) == (0, 3)


def test_they_can_be_pickled():
    made = rewards.get_repetition_penalty_reward(), rewards.get_soft_overlong_punishment(10, 2)
    for function in (*made, rewards.get_cosine_scaled_reward(10)):
        assert pickle.loads(pickle.dumps(function)) == function


class TestAccuracy:
    @pytest.fixture(autouse=True)
    def needs_math_verify(self):
        pytest.importorskip("math_verify")

    @pytest.mark.parametrize("name", ["accuracy_reward", "reasoning_accuracy_reward"])
    @pytest.mark.parametrize("delimiters", [None, ["</answer>", "</think>"]])
    def test_equals_trl(self, theirs, name, delimiters):
        contents, solutions = zip(*ANSWERS)
        called = {"completions": messages(contents), "solution": solutions}
        called |= {"reasoning_delimiters": delimiters} if delimiters and "reasoning" in name else {}
        found, logs = [], []
        for room in (rewards, theirs):
            log = {}
            found.append(getattr(room, name)(**called, log_extra=log.__setitem__))
            logs.append(log)
        assert found[0] == found[1] and logs[0] == logs[1]
        assert {0.0, 1.0, None} == set(found[0])

    def test_in_another_thread(self):
        contents, solutions = zip(*ANSWERS)
        found = []
        work = lambda: found.append(rewards.accuracy_reward(messages(contents), solutions))  # noqa: E731
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert found == [rewards.accuracy_reward(messages(contents), solutions)]

    def test_cosine_scaled(self, theirs):
        contents, solutions = zip(*ANSWERS)
        ids = [[1] * length for length in (0, 10, 50, 100, 200, 30, 99, 1, 5, 70)]
        ours, reference = (
            room.get_cosine_scaled_reward(100, min_value_wrong=-2.0) for room in (rewards, theirs)
        )
        got = ours(completions=messages(contents), solution=solutions, completion_ids=ids, prompts=None)
        want = reference(messages(contents), solutions, ids)
        assert [x is None for x in got] == [x is None for x in want]
        assert [x for x in got if x is not None] == pytest.approx([x for x in want if x is not None])
        assert ours.__name__ == reference.__name__


def test_without_math_verify_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.setattr(rewards.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install math-verify"):
        rewards.accuracy_reward(messages(["1"]), ["1"])
