"""`evaluate`: ask, generate, check."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import jax
from tqdm.auto import tqdm

from jaxtune.data.sources import Source
from jaxtune.evaluate.checkers import Checker, checker
from jaxtune.evaluate.config import EvaluateConfig
from jaxtune.evaluate.questions import (
    NEXT_QUESTION,
    Format,
    Message,
    Question,
    choose_examples,
    conversation,
    prompt_ids,
    read_questions,
)
from jaxtune.evaluate.results import Completion, Judged, Results, judge
from jaxtune.generate import Engine, Sampling
from jaxtune.model import Model
from jaxtune.rl.vllm_engine import VLLMEngine

ROWS = {"cpu": 32}  # answers between two saves
MOST_ROWS = 512  # the same, on an accelerator

Known = Mapping[tuple[int, int], Completion]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first token: questions with prompts, references and a checker."""

    config: EvaluateConfig
    questions: list[Question]
    turns: list[list[Message]]
    prompts: list[list[int]]
    references: list[Any]
    checker_name: str
    checker: Checker
    instruction: str


def plan(
    model: Model,
    rows: Source,
    config: EvaluateConfig,
    *,
    split: str = "test",
    question_column: str | None = None,
    answer_column: str | None = None,
    few_shot_data: Source | None = None,
) -> Plan:
    """Reads questions and references, and makes the prompts; arguments as for `evaluate`."""
    questions, form = read_questions(rows, question_column, answer_column, split)
    name = form.checker if config.checker == "auto" else config.checker
    check = checker(name)
    references = [check.reference(one.answer) for one in questions]
    for one, reference in zip(questions, references, strict=True):
        if reference is None:
            raise ValueError(
                f"row {one.number} has no answer for the checker {name!r}, which expects {check.expects}; it has "
                f"{one.answer[-100:]!r}. Name another answer_column or checker"
            )
    instruction = form.instruction if config.instruction is None else config.instruction
    examples = _examples(config, few_shot_data, question_column, answer_column, form, questions)
    turns = [conversation(one, examples, config, instruction) for one in questions]
    prompts = [prompt_ids(model.tokenizer, one) for one in turns]
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    need = len(prompts[longest]) + config.max_new_tokens
    if need > model.max_seq_length:
        raise ValueError(
            f"row {longest}: {len(prompts[longest])} tokens of the prompt and max_new_tokens={config.max_new_tokens} "
            f"make {need}, the model's max_seq_length is {model.max_seq_length}; lower max_new_tokens or few_shot, or "
            "raise max_seq_length"
        )
    return Plan(config, questions, turns, prompts, references, name, check, instruction)


def _examples(
    config: EvaluateConfig,
    data: Source | None,
    question: str | None,
    answer: str | None,
    form: Format,
    asked: Sequence[Question],
) -> list[Question]:
    if (data is None) != (config.few_shot == 0):
        raise ValueError(
            "few_shot and few_shot_data go together: how many examples, and the rows that they are drawn from"
        )
    if data is None:
        return []
    rows, found = read_questions(data, question, answer, split="train")
    if found is not form:
        raise ValueError(f"few_shot_data has the format {found.name!r}, the questions have {form.name!r}")
    shared = {one.text for one in asked} & {one.text for one in rows}
    if shared:
        raise ValueError(
            f"few_shot_data holds {len(shared)} of the questions, with their answers: {min(shared)[:80]!r}. Take other "
            "rows, as a training split's"
        )
    return choose_examples(rows, config.few_shot, config.seed)


def evaluate(
    model: Model,
    rows: Source,
    config: EvaluateConfig | None = None,
    *,
    split: str = "test",
    question_column: str | None = None,
    answer_column: str | None = None,
    few_shot_data: Source | None = None,
    engine: VLLMEngine | None = None,
    progress: bool = True,
) -> Results:
    """Answers questions and checks the answers.

    Args:
        model: with a tokenizer.
        rows: questions with answers: a file, a hub name, a `datasets.Dataset` or a list of dicts; see
            `jaxtune.evaluate.questions` for the formats.
        config: how to ask and check.
        split: of a hub set or a `DatasetDict`.
        question_column, answer_column: where they stand, if not under a known name.
        few_shot_data: rows that config.few_shot examples are drawn from; the split "train" where there are several.
        engine: that answers in the place of the embedded one; it is left open.
        progress: show a bar.

    Raises:
        ValueError: columns or answers are missing, or a prompt is too long; the message names the row.
        ImportError: the checker "math" without math-verify.
    """
    planned = plan(
        model,
        rows,
        config or EvaluateConfig(),
        split=split,
        question_column=question_column,
        answer_column=answer_column,
        few_shot_data=few_shot_data,
    )
    return carry_out(model, planned, engine=engine, progress=progress)


def carry_out(
    model: Model,
    planned: Plan,
    *,
    known: Known | None = None,
    save: Callable[[list[Completion]], object] | None = None,
    engine: VLLMEngine | None = None,
    rows: int | None = None,
    progress: bool = True,
) -> Results:
    """Generates what is missing, and checks everything.

    Args:
        known: (question, sample) -> a completion that is there already.
        save: gets completions as they come.
        engine: that answers in the place of the embedded one; it is left open.
        rows: answers between two saves; None: what suits the embedded engine.
    """
    config, started, new = planned.config, time.perf_counter(), 0
    have = dict(known or {})
    total = len(planned.questions) * config.n
    judged: dict[int, Judged] = {}
    with (
        Engine(model, progress=progress) if engine is None else nullcontext(engine) as asked,
        tqdm(total=total, desc="evaluate", unit="answer", disable=None if progress else True) as bar,
    ):
        right = 0
        for part, first in chunks(planned, have, rows):
            if first < config.n:
                made = _generate(asked, planned, part, first)
                new += sum(one.tokens for one in made)
                have |= {(one.question, one.sample): one for one in made}
                if save is not None:
                    save(made)
            for i in part:
                completions = [have[i, j] for j in range(config.n)]
                judged[i] = judge(
                    planned.questions[i],
                    planned.turns[i],
                    completions,
                    planned.references[i],
                    planned.checker,
                )
                right += sum(judged[i].right)
            bar.update(len(part) * config.n)
            bar.set_postfix_str(f"accuracy {right / (len(judged) * config.n):.1%}")
    return Results(
        judged=[judged[i] for i in range(len(planned.questions))],
        ks=config.ks,
        checker=planned.checker_name,
        instruction=planned.instruction,
        seconds=time.perf_counter() - started,
        new_tokens=new,
    )


def chunks(planned: Plan, have: Known, rows: int | None = None) -> list[tuple[list[int], int]]:
    """(questions to go through together, their first missing sample), the complete ones first."""
    n = planned.config.n
    rows = rows or ROWS.get(jax.default_backend(), MOST_ROWS)
    by_first: dict[int, list[int]] = {}
    for i in range(len(planned.questions)):
        first = next((j for j in range(n) if (i, j) not in have), n)
        by_first.setdefault(first, []).append(i)
    parts = []
    for first, numbers in sorted(by_first.items(), reverse=True):
        size = max(1, rows // max(1, n - first))
        parts += [(numbers[at : at + size], first) for at in range(0, len(numbers), size)]
    return parts


def _generate(
    engine: Engine | VLLMEngine, planned: Plan, part: Sequence[int], first: int
) -> list[Completion]:
    """Samples `first` to n of some questions; what a sample gets depends on its question, number and seed alone."""
    config, tokenizer = planned.config, engine.model.tokenizer
    cuts = {"top_k": config.top_k, "top_p": config.top_p, "min_p": config.min_p}
    sampling = (
        Sampling(do_sample=True, temperature=config.temperature, **cuts) if config.temperature else None
    )
    made = engine.generate(
        [planned.prompts[i] for i in part],
        n=config.n - first,
        sampling=sampling,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        stop_strings=() if tokenizer.chat_template else (NEXT_QUESTION,),
        streams=[(i, first) for i in part],
    )
    return [
        Completion(
            question=part[one.prompt],
            sample=first + one.sample,
            text=text if tokenizer.chat_template else text.partition(NEXT_QUESTION)[0],
            tokens=len(one.token_ids),
            finish_reason=one.finish_reason,
        )
        for one, text in zip(made, made.texts(tokenizer), strict=True)
    ]
