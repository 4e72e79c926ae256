"""Which of the known dataset formats a row has, and its conversion to one of five canonical forms.

Canonical rows:
    text              {"text"}
    messages          {"messages"} (+ "tools", "chat_template_kwargs")
    prompt_completion {"prompt", "completion"}, both strings
    chat_completion   {"prompt", "completion"}, both lists of messages (+ "tools", "chat_template_kwargs")
    tokenised         {"input_ids"} (+ "labels" or "completion_mask" / "assistant_masks")
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

Row = Mapping[str, Any]

KNOWN_FORMATS = """\
  text               a text column (its name: dataset_text_field)
  messages           messages: [{"role", "content"}, …]; optional columns tools, chat_template_kwargs
  prompt/completion  prompt and completion, both strings or both lists of messages
  ShareGPT           conversations: [{"from", "value"}, …] or [{"role", "content"}, …]
  Alpaca             instruction, output and optionally input (and system)
  tokenised          input_ids, optionally labels (or completion_mask, assistant_masks)
  anything else      with formatting_func: row -> text"""

ROLE_ALIASES = {"human": "user", "input": "user", "gpt": "assistant", "output": "assistant"}

# What a formatting function written for the other calling habit raises when it is probed.
PROBE_ERRORS = (TypeError, KeyError, AttributeError, ValueError, IndexError, TemplateError)


def is_conversation(value: object) -> bool:
    """True for a non-empty list of message dicts (role/content, or ShareGPT's from/value)."""
    if not isinstance(value, list) or not value or not isinstance(value[0], Mapping):
        return False
    return "role" in value[0] or ("from" in value[0] and "value" in value[0])


def detect_format(example: Row, text_field: str = "text") -> str:
    """Name the format of `example`, the first row of a dataset; of several, the first of those below.

    Returns:
        "tokenised", "prompt_completion" or "chat_completion", "messages", "text", "conversations" or "alpaca".

    Raises:
        ValueError: no known format; the message lists the columns found and the formats known.
    """
    if "input_ids" in example:
        return "tokenised"
    if "prompt" in example and "completion" in example:
        conversational = [is_conversation(example[column]) for column in ("prompt", "completion")]
        if all(conversational):
            return "chat_completion"
        if not any(conversational):
            return "prompt_completion"
        raise ValueError(
            "prompt and completion must both be strings or both be lists of messages; came "
            f"{type(example['prompt']).__name__} and {type(example['completion']).__name__}"
        )
    if is_conversation(example.get("messages")):
        return "messages"
    # Notebooks render `conversations` into a text column by themselves: that text is what they want.
    if isinstance(example.get(text_field), str):
        return "text"
    if is_conversation(example.get("conversations")):
        return "conversations"
    if "instruction" in example and "output" in example:
        return "alpaca"
    raise ValueError(
        f"no known dataset format in columns {', '.join(example)}. Known formats:\n{KNOWN_FORMATS}\n"
        "Rename the columns, or pass formatting_func"
    )


def canonical_row(
    row: Row, form: str, *, text_field: str = "text", chat: bool = True
) -> tuple[str, dict[str, Any]]:
    """Convert one row to its canonical form.

    Args:
        row: a dataset row.
        form: what `detect_format` said of the dataset.
        text_field: column of the "text" format.
        chat: the tokenizer has a chat template; Alpaca rows become messages then, and the Alpaca prompt otherwise.

    Returns:
        (name of the canonical form, the canonical row).
    """
    if form == "text":
        return form, {"text": row[text_field]}
    if form == "alpaca":
        return alpaca_row(row, chat=chat)
    options = {
        "tools": json_tools(row.get("tools")),
        "chat_template_kwargs": row.get("chat_template_kwargs") or {},
    }
    if form == "conversations":
        return "messages", {
            "messages": [_openai_message(message) for message in row["conversations"]],
            **options,
        }
    if form == "messages":
        return form, {"messages": row["messages"], **options}
    if form == "prompt_completion":
        return form, {"prompt": row["prompt"], "completion": row["completion"]}
    if form == "chat_completion":
        return form, {"prompt": row["prompt"], "completion": row["completion"], **options}
    return form, dict(row)


def alpaca_row(row: Row, *, chat: bool) -> tuple[str, dict[str, Any]]:
    """An Alpaca row as a conversation (`chat`) or with Stanford Alpaca's prompt text."""
    instruction, extra = row["instruction"], row.get("input") or ""
    if chat:
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        user = {"role": "user", "content": f"{instruction}\n\n{extra}" if extra else instruction}
        answer = [{"role": "assistant", "content": row["output"]}]
        options = {"tools": None, "chat_template_kwargs": {}}
        return "chat_completion", {"prompt": [*system, user], "completion": answer, **options}
    middle = f"### Input:\n{extra}\n\n" if extra else ""
    context = ", paired with an input that provides further context" if extra else ""
    opening = row.get("system") or (
        f"Below is an instruction that describes a task{context}. "
        "Write a response that appropriately completes the request."
    )
    prompt = f"{opening}\n\n### Instruction:\n{instruction}\n\n{middle}### Response:\n"
    return "prompt_completion", {"prompt": prompt, "completion": row["output"]}


def json_tools(tools: list | str | None) -> list | None:
    """Tool schemas, given as a list or as its JSON text.

    Raises:
        ValueError: a text that is no JSON.
    """
    try:
        return json.loads(tools) if isinstance(tools, str) else tools
    except json.JSONDecodeError as error:
        raise ValueError(f"tools: expected a list or its JSON text, got {tools[:80]!r} ({error})") from error


def _openai_message(message: Row) -> dict[str, Any]:
    """ShareGPT's from/value (and human/gpt) as role/content (and user/assistant)."""
    renamed = {{"from": "role", "value": "content"}.get(key, key): value for key, value in message.items()}
    return renamed | {"role": ROLE_ALIASES.get(renamed["role"], renamed["role"])}


def call_formatting(function: Callable[..., Any], rows: Sequence[Row], batched: bool) -> list[str]:
    """Texts of `rows`, from a formatting function of either habit (see `formatting_is_batched`)."""
    if not rows:
        return []
    if batched:
        columns = {column: [row[column] for row in rows] for column in rows[0]}
        texts = _as_texts(function(columns))
        if texts is None:
            raise ValueError(
                "formatting_func returned something other than a list of strings for a batch of rows"
            )
        return texts
    results = [_as_texts(function(dict(row))) for row in rows]
    if None in results:
        raise ValueError(f"formatting_func returned no text for the row {rows[results.index(None)]!r}")
    return [text for texts in results for text in texts or ()]


def formatting_is_batched(function: Callable[..., Any], example: Row) -> bool:
    """Whether `function` expects a dict of lists (as `Dataset.map(batched=True)` gives) rather than one row.

    It is called with the row, and unless that gives a string, with a batch of that row three times over: three
    equal strings mean a batched function.

    Raises:
        ValueError: neither call gives text.
    """
    single, problem = _probe(function, dict(example))
    if isinstance(single, str) or (isinstance(single, Mapping) and isinstance(single.get("text"), str)):
        return False
    batch, batch_problem = _probe(function, {column: [value] * 3 for column, value in example.items()})
    texts = _as_texts(batch)
    if texts is not None and len(texts) == 3 and len(set(texts)) == 1 and not isinstance(batch, str):
        return True
    if _as_texts(single) is not None:
        return False
    raise ValueError(
        "formatting_func must return a string (or a list of strings) for a row, or a list of strings for a batch "
        f"of rows; for a row it gave {problem or type(single).__name__}, "
        f"for a batch {batch_problem or type(batch).__name__}"
    )


def _probe(function: Callable[..., Any], argument: dict[str, Any]) -> tuple[Any, str | None]:
    try:
        return function(argument), None
    except PROBE_ERRORS as error:
        return None, f"{type(error).__name__}: {error}"


def _as_texts(result: object) -> list[str] | None:
    """The strings in what a formatting function returned: text, list of texts, or either under the key "text"."""
    if isinstance(result, Mapping):
        result = result.get("text")
    if isinstance(result, str):
        return [result]
    if isinstance(result, Iterable):
        texts = list(result)
        if texts and all(isinstance(text, str) for text in texts):
            return texts
    return None
