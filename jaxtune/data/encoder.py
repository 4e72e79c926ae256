"""Batches of raw rows to input_ids and labels: format, canonical form, tokens, masks."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from jaxtune.config import SFTConfig
from jaxtune.data import formats, tokenise
from jaxtune.data.tokenise import Encoded

logger = logging.getLogger(__name__)


class RowEncoder:
    """Turns batches of a dataset's rows (dict of lists) into input_ids and labels."""

    def __init__(
        self,
        example: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        args: SFTConfig,
        formatting_func: Callable[..., Any] | None = None,
    ):
        """
        Args:
            example: the first row, which decides the format.
            tokenizer, args, formatting_func: as in `prepare_dataset`.

        Raises:
            ValueError: unknown format, or masks that the format does not allow.
        """
        self.tokenizer, self.args, self.example = tokenizer, args, example
        self.formatting = formatting_func if "input_ids" not in example else None
        self.batched = self.formatting is not None and formats.formatting_is_batched(self.formatting, example)
        self.form = "text" if self.formatting else formats.detect_format(example, args.dataset_text_field)
        logger.info("dataset format: %s (columns %s)", self.form, ", ".join(example))
        self.chat = tokenizer.chat_template is not None
        self.as_is = bool((args.dataset_kwargs or {}).get("skip_prepare_dataset"))
        self.changed_prompts = 0
        self._check_masks()
        self.completion_only = args.completion_only_loss
        if self.completion_only is None:
            self.completion_only = self.form == "alpaca" or {"prompt", "completion"} <= set(example)

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[np.ndarray]]:
        """Columns input_ids and labels, int32 [T] each row; a formatting function may make more rows."""
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        encoded = self._encode(rows)
        self.changed_prompts += sum(row.prompt_changed for row in encoded)
        if self.form == "tokenised" and "labels" in self.example:
            labels = [np.asarray(row["labels"], np.int32) for row in rows]
        else:
            labels = [row.labels(bool(self.completion_only)) for row in encoded]
        return {"input_ids": [row.ids for row in encoded], "labels": labels}

    def warn(self, rows: int) -> None:
        """Log what was noticed on the way through `rows` rows."""
        if self.changed_prompts:
            logger.warning(
                "in %d of %d rows the prompt's tokens change once the completion follows (the template renders it "
                "differently, or tokens merge at the seam); the completion starts at the first that differs",
                self.changed_prompts, rows,
            )  # fmt: skip

    def _encode(self, rows: Sequence[Mapping[str, Any]]) -> list[Encoded]:
        if self.formatting is not None:
            texts = formats.call_formatting(self.formatting, rows, self.batched)
            return tokenise.encode_text_rows([{"text": text} for text in texts], self.tokenizer)
        forms, canonical = zip(
            *(
                formats.canonical_row(row, self.form, text_field=self.args.dataset_text_field, chat=self.chat)
                for row in rows
            ),
            strict=True,
        )
        form = forms[0]
        if form == "text":
            return tokenise.encode_text_rows(canonical, self.tokenizer)
        if form == "prompt_completion":
            return tokenise.encode_prompt_rows(canonical, self.tokenizer)
        if form == "tokenised":
            return [_tokenised_row(row) for row in canonical]
        return tokenise.ChatEncoder(self.tokenizer, self.args.assistant_only_loss).encode(canonical)

    def _check_masks(self) -> None:
        args, columns = self.args, ", ".join(self.example)
        if self.formatting is not None and args.completion_only_loss:
            raise ValueError(
                "completion_only_loss=True and formatting_func exclude each other: a formatted text has no completion"
            )
        if self.as_is and self.form != "tokenised":
            raise ValueError(f"skip_prepare_dataset needs the column input_ids; the dataset has {columns}")
        conversational = self.form in ("messages", "conversations", "chat_completion") or (
            self.form == "alpaca" and self.chat
        )
        if args.assistant_only_loss and not conversational and self.form != "tokenised":
            raise ValueError(
                f"assistant_only_loss=True needs conversations; the dataset's format is {self.form} (columns {columns})"
            )
        if args.completion_only_loss and self.form in ("text", "messages", "conversations"):
            logger.warning(
                "completion_only_loss=True has no effect: the dataset (columns %s) has no prompt and completion, so "
                "every token is trained unless assistant_only_loss or train_on_responses_only masks some", columns,
            )  # fmt: skip


def _tokenised_row(row: Mapping[str, Any]) -> Encoded:
    completion, assistant = (
        None if row.get(column) is None else np.asarray(row[column], bool)
        for column in ("completion_mask", "assistant_masks")
    )
    return Encoded(np.asarray(row["input_ids"], np.int32), completion, assistant)
