"""Conversations with any keys and role names, and conversations out of columns."""

import datasets
import pytest

from jaxtune.data import standardize_data_formats, standardize_sharegpt, to_sharegpt
from jaxtune.data.sharegpt import fill_prompt

STANDARD = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
]
NAMES = {"system": "system", "user": "human", "assistant": "gpt"}


@pytest.mark.parametrize("role,content", [("from", "value"), ("role", "content"), ("speaker", "words")])
def test_standardize(role, content):
    turns = [{role: NAMES[turn["role"]], content: turn["content"]} for turn in STANDARD]
    other = [{role: "human", content: "What?"}, {role: "gpt", content: "That."}]
    dataset = datasets.Dataset.from_dict({"conversations": [turns, other], "source": ["a", "b"]})
    for function in (standardize_sharegpt, standardize_data_formats):
        result = function(dataset)
        assert result[0] == {"conversations": STANDARD, "source": "a"}
        assert result[1]["conversations"][1] == {"role": "assistant", "content": "That."}


def test_standardize_leaves_others_alone():
    dataset = datasets.Dataset.from_dict({"text": ["a"]})
    assert standardize_sharegpt(dataset) is dataset


def test_unknown_role():
    dataset = datasets.Dataset.from_dict({"conversations": [[{"from": "robot", "value": "x"}]]})
    with pytest.raises(TypeError, match="role 'robot' is none of system, user"):
        standardize_sharegpt(dataset)
    standard = standardize_sharegpt(dataset, aliases_for_assistant=["robot"])
    assert standard[0]["conversations"] == [{"role": "assistant", "content": "x"}]
    keys = datasets.Dataset.from_dict({"conversations": [[{"a": "1", "b": "2", "c": "3"}]]})
    with pytest.raises(TypeError, match="two keys"):
        standardize_sharegpt(keys)


TABLE = {
    "instruction": ["Add", "Say hello", "Sort"],
    "input": ["12 + 30", "", None],
    "output": ["42", "Hello", "abc"],
}


def test_to_sharegpt():
    dataset = to_sharegpt(
        datasets.Dataset.from_dict(TABLE), merged_prompt="{instruction}[[\nInput: {input}]]!"
    )
    assert dataset.column_names == ["conversations"]
    assert [row["conversations"][0] for row in dataset] == [
        {"from": "human", "value": "Add\nInput: 12 + 30!"},
        {"from": "human", "value": "Say hello!"},
        {"from": "human", "value": "Sort!"},
    ]
    assert dataset[0]["conversations"][1] == {"from": "gpt", "value": "42"}
    simple = to_sharegpt(datasets.Dataset.from_dict(TABLE), remove_unused_columns=False)
    assert simple.column_names == ["instruction", "input", "output", "conversations"]
    assert simple[2]["conversations"][0]["value"] == "Sort"


def test_conversation_extension():
    table = datasets.Dataset.from_dict(
        {"instruction": [f"q{n}" for n in range(20)], "output": [f"a{n}" for n in range(20)]}
    )
    dataset = to_sharegpt(table, conversation_extension=3)
    for number, row in enumerate(dataset):
        values = [turn["value"] for turn in row["conversations"]]
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"] * 3
        assert values[:2] == [f"q{number}", f"a{number}"]
        assert [value[1:] for value in values[::2]] == [value[1:] for value in values[1::2]]
    assert to_sharegpt(table, conversation_extension=3)[:] == dataset[:]
    assert to_sharegpt(table, conversation_extension=3, random_state=1)[:] != dataset[:]
    second, third = ([row["conversations"][2 * extra]["value"] for row in dataset] for extra in (1, 2))
    assert second != third
    for extra in (1, 2):  # each extension uses every row once
        assert len({row["conversations"][2 * extra]["value"] for row in dataset}) == 20


def test_fill_prompt():
    row = {"a": 1, "b": "", "c": "{a}"}
    assert fill_prompt("{a}[[ {b}]][[ {a}{c}]]", row) == "1 1{a}"
    assert fill_prompt("{a}[[ fixed]]", row) == "1 fixed"


def test_refusals():
    dataset = datasets.Dataset.from_dict(TABLE)
    with pytest.raises(ValueError, match="no column question; the dataset has instruction, input, output"):
        to_sharegpt(dataset, merged_prompt="{question}")
    with pytest.raises(ValueError, match="names no column"):
        to_sharegpt(dataset, merged_prompt="always the same")
