"""ShareGPT conversations: reading any keys and role names, and making conversations out of columns."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
from datasets.fingerprint import generate_random_fingerprint

SAMPLE_ROWS = 10
OPTIONAL = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
COLUMN = re.compile(r"\{(\w+)\}")


def standardize_sharegpt(
    dataset: datasets.Dataset,
    tokenizer: Any = None,
    aliases_for_system: Sequence[str] = ("system",),
    aliases_for_user: Sequence[str] = ("user", "human", "input"),
    aliases_for_assistant: Sequence[str] = ("gpt", "assistant", "output"),
    batch_size: int = 1000,
    num_proc: int | None = None,
) -> datasets.Dataset:
    """Give `conversations` the keys role and content and the roles system, user and assistant.

    Which key holds the role is found from the first rows: the one whose values repeat.

    Args:
        dataset: returned as it is where it has no `conversations` column.
        tokenizer, num_proc: accepted for notebooks that pass them; not needed here.
        aliases_for_system, aliases_for_user, aliases_for_assistant: names of the roles in the data.
        batch_size: rows worked on at once.

    Returns:
        The dataset with `conversations` rewritten, other columns kept.

    Raises:
        TypeError: a role that is in none of the aliases, or messages without two keys to tell apart.
    """
    del tokenizer, num_proc
    if "conversations" not in dataset.column_names:
        return dataset
    role_key, content_key = _keys(dataset[:SAMPLE_ROWS]["conversations"])
    roles = {
        alias: role
        for role, aliases in (
            ("system", aliases_for_system),
            ("user", aliases_for_user),
            ("assistant", aliases_for_assistant),
        )
        for alias in aliases
    }

    def rewrite(batch: Mapping[str, list]) -> dict[str, list]:
        return {"conversations": [[_turn(message) for message in row] for row in batch["conversations"]]}

    def _turn(message: Mapping[str, Any]) -> dict[str, Any]:
        if message[role_key] not in roles:
            raise TypeError(
                f"role '{message[role_key]}' is none of {', '.join(roles)}; add it to the aliases_for_ lists"
            )
        return {"role": roles[message[role_key]], "content": message[content_key]}

    return _uncached_map(dataset, rewrite, "Standardising conversations", batch_size=batch_size)


standardize_data_formats = standardize_sharegpt


def to_sharegpt(
    dataset: datasets.Dataset,
    merged_prompt: str = "",
    merged_column_name: str = "instruction",
    output_column_name: str = "output",
    remove_unused_columns: bool = True,
    conversation_extension: int = 1,
    random_state: int = 3407,
) -> datasets.Dataset:
    """Make conversations (from/value, human/gpt) of a table's columns.

    Args:
        merged_prompt: text with {column} fields; a part in [[double brackets]] is left out where a column in
            it is empty or None. "" takes `merged_column_name` as it is.
        merged_column_name: the column with the user's words, if there is no merged_prompt.
        output_column_name: the column with the answer.
        remove_unused_columns: keep nothing but `conversations`.
        conversation_extension: join this many rows, chosen at random, into each conversation.
        random_state: seed of that choice.

    Raises:
        ValueError: a column that is not there, or an empty prompt.
    """
    prompt = merged_prompt or f"{{{merged_column_name}}}"
    wanted = [*COLUMN.findall(prompt), output_column_name]
    if missing := [column for column in wanted if column not in dataset.column_names]:
        raise ValueError(f"no column {', '.join(missing)}; the dataset has {', '.join(dataset.column_names)}")
    if len(wanted) == 1:
        raise ValueError(
            f"merged_prompt names no column, for instance {{instruction}}; came {merged_prompt!r}"
        )

    def build(batch: Mapping[str, list]) -> dict[str, list]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        return {
            "conversations": [
                [
                    {"from": "human", "value": fill_prompt(prompt, row)},
                    {"from": "gpt", "value": str(row[output_column_name])},
                ]
                for row in rows
            ]
        }

    unused = dataset.column_names if remove_unused_columns else None
    single = _uncached_map(dataset, build, "Making conversations", remove_columns=unused)
    if conversation_extension <= 1:
        return single
    others = [
        single.shuffle(seed=random_state + extra)["conversations"][:]
        for extra in range(1, conversation_extension)
    ]

    def extend(batch: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        rows = zip(indices, batch["conversations"], strict=True)
        return {
            "conversations": [[*first, *(turn for other in others for turn in other[i])] for i, first in rows]
        }

    return _uncached_map(single, extend, "Extending conversations", with_indices=True)


def fill_prompt(prompt: str, row: Mapping[str, Any]) -> str:
    """Put a row's values into {column} fields; drop [[parts]] with an empty one.

    >>> fill_prompt("Do {what}.[[ With {tool}.]]", {"what": "it", "tool": ""})
    'Do it.'
    """

    def optional(match: re.Match[str]) -> str:
        empty = any(row[column] in (None, "") for column in COLUMN.findall(match[1]))
        return "" if empty else match[1]

    return COLUMN.sub(lambda match: str(row[match[1]]), OPTIONAL.sub(optional, prompt))


def _keys(rows: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[str, str]:
    """(role key, content key): of the two keys, the one with fewer different values is the role's."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for message in row:
            for key, value in message.items():
                values.setdefault(key, set()).add(str(value))
    for role, content in (("role", "content"), ("from", "value")):
        if role in values and content in values:
            return role, content
    if len(values) != 2:
        raise TypeError(f"expected messages of two keys, a role's and a content's; came {', '.join(values)}")
    role, content = sorted(values, key=lambda key: len(values[key]))
    return role, content


def _uncached_map(
    dataset: datasets.Dataset, function: Callable[..., Any], title: str, **options: Any
) -> datasets.Dataset:
    return dataset.map(
        function,
        batched=True,
        load_from_cache_file=False,
        keep_in_memory=True,
        new_fingerprint=generate_random_fingerprint(),
        desc=title,
        **options,
    )
