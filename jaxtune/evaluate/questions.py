"""Rows -> questions with answers, and the prompts that ask them.

Known formats, by their columns (capitals do not matter) and their answers:

    gsm8k   question, answer (a solution that ends in "#### 18")
    math    problem or question, answer (a number, or LaTeX), as AIME's and MATH's sets have it; solution may be there
    plain   any two columns; the answer is a text
"""

import random
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtune.data.sources import Source, load_dataset
from jaxtune.evaluate.config import CheckerName, EvaluateConfig

QUESTION_COLUMNS = ("question", "problem", "prompt")
ANSWER_COLUMNS = ("answer", "expected_answer", "solution")
ID_COLUMNS = ("id", "unique_id")
_NUMERIC = re.compile(r"\s*-?[\d,]*\.?\d+\s*")
# Where a model without a chat template goes on with the next question by itself.
NEXT_QUESTION = "\nQuestion:"

Message = dict[str, str]


class Question(NamedTuple):
    """number: of its row. id: the data's, or the number. answer: the reference. solution: how an example shows it."""

    number: int
    id: str
    text: str
    answer: str
    solution: str


class Format(NamedTuple):
    """What a kind of data asks for: how to check it, and what to tell the model of the answer's form."""

    name: str
    checker: CheckerName
    instruction: str


GSM8K = Format(
    "gsm8k", "gsm8k", 'Let\'s think step by step and output the final answer after "####".'
)  # as verl
MATH = Format(
    "math", "math", r"Please reason step by step, and put your final answer within \boxed{}."
)  # as Qwen
PLAIN = Format("plain", "exact", "")


def read_questions(
    rows: Source,
    question_column: str | None = None,
    answer_column: str | None = None,
    split: str = "test",
) -> tuple[list[Question], Format]:
    """Questions of a data set, and its format.

    Args:
        rows: what `jaxtune.data.load_dataset` takes.
        question_column, answer_column: None: the first of QUESTION_COLUMNS and ANSWER_COLUMNS that there is.
        split: of a hub set or a `DatasetDict`.

    Raises:
        ValueError: a column is missing, or a row has no question or no answer.
    """
    table = load_dataset(rows, split)
    names = table.column_names
    question = _column("question", question_column, QUESTION_COLUMNS, names)
    answer = _column("answer", answer_column, ANSWER_COLUMNS, names)
    texts = [_text(value) for value in table[question]]
    answers = [_text(value) for value in table[answer]]
    for i, (text, right) in enumerate(zip(texts, answers, strict=True)):
        for column, value in ((question, text), (answer, right)):
            if not value:
                raise ValueError(f"row {i} has nothing in the column {column!r}: {dict(table[i])!r:.200}")
    form = _format(question, answers)
    identifier = _find(ID_COLUMNS, names)
    ids = [str(value) for value in table[identifier]] if identifier else [str(i) for i in range(len(texts))]
    worked = _find(("solution",), names)
    solutions = [_text(value) for value in table[worked]] if worked and form is MATH else [""] * len(texts)
    found = [
        Question(i, ids[i], texts[i], answers[i], solutions[i] or _shown(answers[i], form))
        for i in range(len(texts))
    ]
    return found, form


def _find(wanted: Sequence[str], names: Sequence[str]) -> str | None:
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in wanted if name in lower), None)


def _column(what: str, given: str | None, known: Sequence[str], names: Sequence[str]) -> str:
    found = _find(known, names) if given is None else given
    if found is None or found not in names:
        wanted = " or ".join(map(repr, known)) if given is None else repr(given)
        raise ValueError(
            f"the data has no column {wanted}; it has {', '.join(names)}. Name one with {what}_column"
        )
    return found


def _text(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    return "" if value is None else str(value).strip()


def _format(question: str, answers: Sequence[str]) -> Format:
    if all("#### " in answer for answer in answers):
        return GSM8K
    if question.lower() == "problem" or all(_NUMERIC.fullmatch(answer) for answer in answers):
        return MATH
    return PLAIN


def _shown(answer: str, form: Format) -> str:
    return rf"\boxed{{{answer}}}" if form is MATH and r"\boxed" not in answer else answer


def choose_examples(questions: Sequence[Question], count: int, seed: int) -> list[Question]:
    """`count` of them, the same for the same seed.

    Raises:
        ValueError: there are not so many.
    """
    if count > len(questions):
        raise ValueError(f"few_shot={count} examples are wanted, few_shot_data has {len(questions)} rows")
    return random.Random(seed).sample(list(questions), count)


def conversation(
    question: Question, examples: Sequence[Question], config: EvaluateConfig, instruction: str
) -> list[Message]:
    """System message, examples as turns, and the question."""
    asked = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
    for one in examples:
        asked.append({"role": "user", "content": f"{one.text} {instruction}".strip()})
        asked.append({"role": "assistant", "content": one.solution})
    return [*asked, {"role": "user", "content": f"{question.text} {instruction}".strip()}]


def prompt_ids(tokenizer: Any, turns: Sequence[Message]) -> list[int]:
    """Tokens of a conversation through the chat template, or as plain text where there is none."""
    if tokenizer.chat_template:
        encoded = tokenizer.apply_chat_template(list(turns), add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])
    labels = {"user": "Question: ", "assistant": "Answer: ", "system": ""}
    parts = [labels[turn["role"]] + turn["content"] for turn in turns]
    return tokenizer("\n\n".join(parts) + "\n\nAnswer:")["input_ids"]
