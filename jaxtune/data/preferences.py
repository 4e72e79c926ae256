"""`prepare_preferences`: pairs of a chosen and a rejected completion to token ids, as TRL's DPOTrainer makes them."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from jaxtune.data.columns import DOCUMENTS, IGNORE, list_dataset, ragged_column
from jaxtune.data.formats import is_conversation, json_tools
from jaxtune.data.prepare import map_tokens, plain_rows
from jaxtune.data.sources import Source, load_dataset
from jaxtune.data.tokenise import ChatEncoder, common_prefix, encode_text, with_eos

logger = logging.getLogger(__name__)

PAIR_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
_FEATURES = datasets.Features({name: datasets.List(datasets.Value("int32")) for name in PAIR_COLUMNS})
Row = dict[str, Any]


def prepare_preferences(
    dataset: Source, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> datasets.Dataset:
    """Tokenise a preference dataset.

    Ids equal those of TRL's DPOTrainer, but for a text that already starts with BOS: it gets no second one.

    Args:
        dataset: see `load_dataset`. Columns chosen and rejected, and prompt; all texts, or all lists of messages
            (then also tools, chat_template_kwargs). Without a prompt, or with a text beside messages, the prompt is
            what chosen and rejected begin with alike. One that has prompt_ids, chosen_ids and rejected_ids is kept.
        tokenizer: with a chat template for messages; its EOS token ends each text.
        max_length: tokens; rows whose prompt alone has as many are dropped.

    Returns:
        A dataset of int32 columns prompt_ids, chosen_ids, rejected_ids; where prompt and completion are tokenised
        otherwise together than alone, a completion starts at the first token that differs.

    Raises:
        ValueError: columns are missing, a template refuses a row, or no row is left.
    """
    rows = plain_rows(load_dataset(dataset))
    if not set(PAIR_COLUMNS) <= set(rows.column_names):
        encoder = PairEncoder(rows[0], tokenizer)
        rows = map_tokens(rows, encoder, "Tokenising", _FEATURES)
        encoder.warn(len(rows))
    if max_length is None:
        return rows
    kept = np.flatnonzero(ragged_column(rows, "prompt_ids").lengths < max_length)
    dropped = len(rows) - len(kept)
    if not len(kept):
        raise ValueError(
            f"all {dropped} prompts have max_length={max_length} tokens or more: nothing of a completion would be "
            "left; raise max_length"
        )
    if dropped:
        logger.warning(
            "%d of %d rows were dropped: their prompt alone has max_length=%d tokens or more",
            dropped, len(rows), max_length,
        )  # fmt: skip
    return rows.select(kept) if dropped else rows


def pair_rows(dataset: datasets.Dataset, max_length: int | None = None) -> datasets.Dataset:
    """Pairs as sequences: rows 2i and 2i + 1 are pair i's chosen and rejected one, cut to max_length on the right.

    Args:
        dataset: columns prompt_ids, chosen_ids, rejected_ids, and documents where it has images: two numbers a pair.

    Returns:
        2N rows of input_ids and labels (-100 on the prompt), and documents, one number each.
    """
    prompts, *completions = (ragged_column(dataset, name) for name in PAIR_COLUMNS)
    ids, labels = [], []
    for i in range(len(dataset)):
        prompt = prompts.row(i)
        for completion in completions:
            whole = np.concatenate([prompt, completion.row(i)])[:max_length]
            ids.append(whole)
            labels.append(np.where(np.arange(len(whole)) < len(prompt), IGNORE, whole))
    lengths = np.asarray([len(row) for row in ids])
    columns = {
        name: (np.concatenate(rows), lengths) for name, rows in (("input_ids", ids), ("labels", labels))
    }
    if DOCUMENTS in dataset.column_names:
        columns[DOCUMENTS] = ragged_column(dataset, DOCUMENTS).values, np.ones(len(ids), np.int64)
    return list_dataset(columns)


class PairEncoder:
    """Turns batches of rows (dict of lists) into prompt_ids, chosen_ids and rejected_ids."""

    def __init__(self, example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase):
        """
        Args:
            example: the first row, which decides the format.

        Raises:
            ValueError: chosen or rejected is missing, or one is a text and the other messages.
        """
        missing = [name for name in ("chosen", "rejected") if name not in example]
        if missing:
            raise ValueError(
                f"a preference dataset has the columns chosen and rejected, and prompt if they do not begin with it; "
                f"{' and '.join(missing)} missing among {', '.join(example)}"
            )
        conversational = {
            name: is_conversation(example[name])
            for name in ("prompt", "chosen", "rejected")
            if name in example
        }
        self.chat = conversational["chosen"]
        if conversational["rejected"] != self.chat:
            raise ValueError("chosen and rejected must both be texts or both be lists of messages")
        if not self.chat and conversational.get("prompt"):
            raise ValueError("prompt is a list of messages; chosen and rejected must be such lists too")
        self.explicit = conversational.get("prompt") == self.chat
        self.tokenizer = tokenizer
        self.encoder = ChatEncoder(tokenizer, assistant_only=False) if self.chat else None
        self.changed_prompts = 0

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[np.ndarray]]:
        rows: list[Row] = [
            dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)
        ]
        if not self.explicit:
            rows = [{**row, **split_prompt(row["chosen"], row["rejected"])} for row in rows]
        triples = zip(*(self._chats(rows) if self.encoder else self._texts(rows)), strict=True)
        columns = zip(*(self._split(*triple) for triple in triples), strict=True)
        return dict(zip(PAIR_COLUMNS, map(list, columns), strict=True))

    def _texts(self, rows: Sequence[Row]) -> list[list[np.ndarray]]:
        """Ids of the prompts, and of the prompts with either completion."""
        whole = [
            [row["prompt"] + with_eos(row[name], self.tokenizer) for row in rows]
            for name in ("chosen", "rejected")
        ]
        return [encode_text(self.tokenizer, texts) for texts in ([row["prompt"] for row in rows], *whole)]

    def _chats(self, rows: Sequence[Row]) -> list[list[np.ndarray]]:
        assert self.encoder is not None
        options = [
            {"tools": json_tools(row.get("tools")), **(row.get("chat_template_kwargs") or {})} for row in rows
        ]
        asking = [chosen | {"add_generation_prompt": True} for chosen in options]
        prompts = self.encoder.ids([row["prompt"] for row in rows], asking)
        return [
            prompts,
            *(
                self.encoder.ids([[*row["prompt"], *row[name]] for row in rows], options)
                for name in ("chosen", "rejected")
            ),
        ]

    def _split(
        self, prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        length = min(common_prefix(prompt, chosen), common_prefix(prompt, rejected))
        self.changed_prompts += length < len(prompt)
        return prompt[:length], chosen[length:], rejected[length:]

    def warn(self, rows: int) -> None:
        """Log what was noticed on the way through `rows` rows."""
        if self.changed_prompts:
            logger.warning(
                "in %d of %d rows the prompt's tokens change once a completion follows (the template renders it "
                "differently, or tokens merge at the seam); completions start at the first that differs",
                self.changed_prompts, rows,
            )  # fmt: skip


def split_prompt(chosen: Sequence, rejected: Sequence) -> Row:
    """What two texts, or two lists of messages, begin with alike is the prompt; a space before the rest stays with it.

    >>> split_prompt("The sky is blue.", "The sky is green.")
    {'prompt': 'The sky is', 'chosen': ' blue.', 'rejected': ' green.'}
    """
    shortest = min(len(chosen), len(rejected))
    if not shortest:
        raise ValueError(f"chosen and rejected must not be empty; came {chosen!r} and {rejected!r}")
    # Of two that differ in length alone, the last they share is left to both completions, as TRL does.
    index = next((i for i in range(shortest) if chosen[i] != rejected[i]), None)
    if index is None:
        index = shortest - 1
    elif index and chosen[index - 1] == " ":
        index -= 1
    return {"prompt": chosen[:index], "chosen": chosen[index:], "rejected": rejected[index:]}
