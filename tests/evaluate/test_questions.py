"""Rows of known and unknown formats, and the prompts made of them."""

import json
import re

import datasets
import pytest

from jaxtune.evaluate.config import EvaluateConfig
from jaxtune.evaluate.questions import choose_examples, conversation, prompt_ids, read_questions

GSM8K = [{"question": "1+1?", "answer": "one more\n#### 2"}, {"question": "2+2?", "answer": "#### 4"}]
AIME = [
    {"ID": "2024-II-4", "Problem": "Find $m+n$.", "Solution": "long", "Answer": "33"},
    {"ID": "2024-I-1", "Problem": "Find $x$.", "Solution": "", "Answer": "073"},
]


@pytest.mark.parametrize(
    "rows, name, ids, answers",
    [
        (GSM8K, "gsm8k", ["0", "1"], ["one more\n#### 2", "#### 4"]),
        (AIME, "math", ["2024-II-4", "2024-I-1"], ["33", "073"]),
        ([{"id": 7, "problem": "p", "answer": "204", "url": "u", "year": 2024}], "math", ["7"], ["204"]),
        ([{"problem": "p", "solution": r"so $\boxed{\frac12}$", "level": 3}], "math", ["0"], [r"so $\boxed{\frac12}$"]),
        ([{"question": "q", "answer": 70}, {"question": "q", "answer": -1588}], "math", ["0", "1"], ["70", "-1588"]),
        ([{"question": "q", "answer": "Paris"}], "plain", ["0"], ["Paris"]),
    ],
)  # fmt: skip
def test_known_formats(rows, name, ids, answers):
    questions, form = read_questions(rows)
    assert form.name == name
    assert [one.id for one in questions] == ids and [one.answer for one in questions] == answers
    assert [one.number for one in questions] == list(range(len(rows)))


def test_columns_by_name_and_from_a_file(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"Q": f"q{i}", "A": f"a{i}"}) + "\n" for i in range(3)))
    questions, form = read_questions(str(file), "Q", "A")
    assert [(one.text, one.answer) for one in questions] == [("q0", "a0"), ("q1", "a1"), ("q2", "a2")]
    assert form.instruction == ""


@pytest.mark.parametrize(
    "rows, columns, message",
    [
        ([{"q": "1", "answer": "2"}], (None, None), "no column 'question' or 'problem' or 'prompt'; it has q, answer."),
        ([{"question": "1", "a": "2"}], (None, None), "it has question, a. Name one with answer_column"),
        ([{"question": "1", "answer": "2"}], ("text", None), "no column 'text'; it has question, answer"),
        ([*GSM8K, {"question": "3?", "answer": None}], (None, None), "row 2 has nothing in the column 'answer'"),
        ([{"question": " ", "answer": "2"}], (None, None), "row 0 has nothing in the column 'question'"),
        ([], (None, None), "no rows"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(rows, columns, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_questions(rows, *columns)


def test_the_test_split_unless_another_is_named():
    splits = datasets.DatasetDict(
        {name: datasets.Dataset.from_list([{"question": name, "answer": "1"}]) for name in ("train", "test")}
    )
    assert read_questions(splits)[0][0].text == "test"
    assert read_questions(splits, split="train")[0][0].text == "train"


def test_an_empty_file(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"no rows: .*empty\.jsonl is empty"):
        read_questions(tmp_path / "empty.jsonl")


def test_examples_are_drawn_once_and_shown_with_their_solutions():
    questions, _ = read_questions([{"question": f"{i}?", "answer": f"why\n#### {i}"} for i in range(20)])
    chosen = choose_examples(questions, 3, seed=1)
    assert chosen == choose_examples(questions, 3, seed=1) != choose_examples(questions, 3, seed=2)
    turns = conversation(questions[0], chosen, EvaluateConfig(system_prompt="Be short."), "Think.")
    assert [turn["role"] for turn in turns] == ["system", *["user", "assistant"] * 3, "user"]
    assert turns[1]["content"] == f"{chosen[0].text} Think."
    assert turns[2]["content"] == chosen[0].answer
    assert turns[-1]["content"] == "0? Think."
    with pytest.raises(ValueError, match="few_shot=21 examples are wanted, few_shot_data has 20 rows"):
        choose_examples(questions, 21, seed=1)


def test_solutions_of_mathematics():
    questions, _ = read_questions(AIME)
    assert [one.solution for one in questions] == ["long", r"\boxed{073}"]


def test_prompts_with_and_without_a_chat_template(tiny_tokenizer):
    questions, _ = read_questions(GSM8K)
    turns = conversation(questions[1], questions[:1], EvaluateConfig(system_prompt="Sums."), "")
    text = tiny_tokenizer.decode(prompt_ids(tiny_tokenizer, turns))
    assert text.startswith("<|im_start|>system\nSums.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>")
    assert text.endswith("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n")

    class Plain:
        chat_template = None

        def __call__(self, text):
            return {"input_ids": text}

    expected = "Sums.\n\nQuestion: 1+1?\n\nAnswer: one more\n#### 2\n\nQuestion: 2+2?\n\nAnswer:"
    assert prompt_ids(Plain(), turns) == expected
