"""`prepare_dataset`: any known dataset to input_ids and labels, as TRL's SFTTrainer makes them."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
from datasets.fingerprint import generate_random_fingerprint
from transformers import PreTrainedTokenizerBase

from jaxtune.config import SFTConfig
from jaxtune.data.columns import (
    DOCUMENTS,
    IGNORE,
    TOKEN_COLUMNS,
    content_digest,
    gather,
    list_dataset,
    ragged_column,
)
from jaxtune.data.encoder import RowEncoder
from jaxtune.data.sources import Source, load_dataset
from jaxtune.data.templates import use_chat_template_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparationReport:
    """What became of the rows.

    Attributes:
        rows_in: rows given (after a formatting function that may yield several texts a row).
        rows: rows kept.
        dropped: rows left out because no label remained to train on.
        truncated: rows cut to max_length.
        longest: tokens of the longest row before it was cut.
        max_length: tokens that rows were cut to; None = not cut.
    """

    rows_in: int
    rows: int
    dropped: int
    truncated: int
    longest: int
    max_length: int | None

    def then(self, later: "PreparationReport") -> "PreparationReport":
        """The report of two passes over the same rows."""
        return replace(self, rows=later.rows, dropped=self.dropped + later.dropped)


def preparation_report(dataset: datasets.Dataset) -> PreparationReport | None:
    """The report of a dataset that came from `prepare_dataset` or `train_on_responses_only`; None of any other."""
    return getattr(dataset, "preparation", None)


def prepare_dataset(
    dataset: Source,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    formatting_func: Callable[..., Any] | None = None,
) -> datasets.Dataset:
    """Tokenise a dataset and decide which tokens are trained.

    Ids and labels equal those of TRL's SFTTrainer, with these differences, each on purpose: ShareGPT's
    human/gpt become user/assistant; a text that already starts with BOS does not get a second one; rows
    without a trained token are dropped in every mode, packing included; `assistant_only_loss` works with chat
    templates TRL does not know. Nothing is read from or written to a cache, so the result is never that of
    older rows or templates.

    Args:
        dataset: see `load_dataset`; formats in `formats.KNOWN_FORMATS`.
        tokenizer: its EOS token and chat template are set to `args.eos_token` and that of
            `args.chat_template_path`, where these are given.
        args: SFTConfig. `dataset_num_proc` is not read: tokenisation runs in batches on the tokenizer's
            threads.
        formatting_func: row -> text (or texts), or a batch of rows (dict of lists) -> texts.

    Returns:
        A dataset of int32 columns input_ids and labels (same length, -100 = not trained, not shifted),
        truncated to `args.max_length` (but not for packing strategies that keep the overflow), not packed.
        `preparation_report` tells how many rows were dropped and truncated.

    Raises:
        ValueError: unknown format, a template that refuses a row, or no trained token in the whole dataset.
    """
    if args.packing and args.max_length is None:
        raise ValueError("packing needs max_length, the length of a packed row; it is None")
    rows = plain_rows(load_dataset(dataset))
    if args.chat_template_path is not None:
        use_chat_template_of(tokenizer, args.chat_template_path)
    _set_eos(tokenizer, args.eos_token)
    encoder = RowEncoder(rows[0], tokenizer, args, formatting_func)
    encoded = map_tokens(rows, encoder, "Tokenising")
    encoder.warn(len(encoded))
    overflow_kept = args.packing and args.packing_strategy != "bfd"
    limit = None if overflow_kept or encoder.as_is else args.max_length
    prepared = truncate_and_drop(encoded, limit, explain=_explainer(tokenizer, args))
    if args.shuffle_dataset:
        return sealed(prepared.shuffle(seed=args.seed), preparation_report(prepared))
    return prepared


def truncate_and_drop(
    dataset: datasets.Dataset,
    max_length: int | None,
    *,
    explain: Callable[[datasets.Dataset], str],
    earlier: PreparationReport | None = None,
) -> datasets.Dataset:
    """Cut rows to `max_length` tokens, drop those without a label to train; log both and attach the report.

    Args:
        dataset: columns input_ids, labels; documents, one of each row, where it has images.
        max_length: tokens; None cuts nothing.
        explain: text for the error if every row goes, made from `dataset`.
        earlier: report of what was done to these rows before; the new one goes on from it.

    Raises:
        ValueError: no row has a label left, or a row's ids and labels differ in number.
    """
    ids, labels = ragged_column(dataset, "input_ids"), ragged_column(dataset, "labels")
    if (ids.lengths != labels.lengths).any():
        row = int((ids.lengths != labels.lengths).argmax())
        raise ValueError(f"row {row} has {ids.lengths[row]} input_ids but {labels.lengths[row]} labels")
    lengths = ids.lengths if max_length is None else np.minimum(ids.lengths, max_length)
    row_of_label = np.repeat(np.arange(len(ids)), lengths)[
        gather(labels.values, ids.starts, lengths) != IGNORE
    ]
    kept = np.bincount(row_of_label, minlength=len(ids)) > 0
    report = PreparationReport(
        rows_in=len(ids),
        rows=int(kept.sum()),
        dropped=int((~kept).sum()),
        truncated=int((ids.lengths > lengths).sum()),
        longest=int(ids.lengths.max(initial=0)),
        max_length=max_length,
    )
    if not report.rows:
        raise ValueError(explain(dataset))
    if report.truncated:
        logger.warning(
            "%d of %d rows were cut to max_length=%s tokens (the longest had %d)",
            report.truncated, report.rows_in, max_length, report.longest,
        )  # fmt: skip
    if report.dropped:
        logger.warning(
            "%d of %d rows were dropped: no token of theirs is trained", report.dropped, report.rows_in
        )
    starts, lengths = ids.starts[kept], lengths[kept]
    columns = {"input_ids": ids.values, "labels": labels.values}
    left = {name: (gather(values, starts, lengths), lengths) for name, values in columns.items()}
    if DOCUMENTS in dataset.column_names:
        left[DOCUMENTS] = ragged_column(dataset, DOCUMENTS).values[kept], np.ones(report.rows, np.int64)
    cut = list_dataset(left)
    return sealed(cut, report if earlier is None else earlier.then(report))


def map_tokens(
    dataset: datasets.Dataset,
    function: Callable[..., Any],
    title: str,
    columns: datasets.Features = TOKEN_COLUMNS,
) -> datasets.Dataset:
    """`function` over batches of rows, with a progress bar; the result has the token columns alone.

    It stays in memory and no cache is asked: a cached result could be that of an older template or function.
    """
    return dataset.map(
        function,
        batched=True,
        remove_columns=dataset.column_names,
        features=columns,
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint=generate_random_fingerprint(),
        desc=title,
    )


def sealed(dataset: datasets.Dataset, report: PreparationReport | None) -> datasets.Dataset:
    """A tokenised dataset with its report, and a fingerprint that depends on its tokens and labels alone."""
    table = dataset.with_format("arrow")[:]
    return attach_report(datasets.Dataset(table, fingerprint=content_digest(dataset)), report)


def attach_report(dataset: datasets.Dataset, report: PreparationReport | None) -> datasets.Dataset:
    """`dataset` with its report where `preparation_report` finds it."""
    setattr(dataset, "preparation", report)  # noqa: B010 - Dataset declares no such attribute
    return dataset


def plain_rows(dataset: datasets.Dataset) -> datasets.Dataset:
    """A dataset whose rows are Python values.

    Raises:
        ValueError: it has a transform.
    """
    if dataset.format["type"] == "custom":
        raise ValueError(
            "the dataset has a with_transform() function, which may give other rows each time; apply it once with "
            "Dataset.map() instead"
        )
    return dataset.with_format(None)


def _set_eos(tokenizer: PreTrainedTokenizerBase, eos_token: str | None) -> None:
    if eos_token is None:
        return
    if eos_token not in tokenizer.get_vocab():
        raise ValueError(
            f"eos_token '{eos_token}' is not in the tokenizer's vocabulary; its own is {tokenizer.eos_token!r}"
        )
    tokenizer.eos_token = eos_token


def _explainer(tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> Callable[[datasets.Dataset], str]:
    """What to say when no row has a trained token."""

    def explain(dataset: datasets.Dataset) -> str:
        ids, labels = dataset[0]["input_ids"], dataset[0]["labels"]
        first = next((index for index, label in enumerate(labels) if label != IGNORE), None)
        if first is None:
            why = (
                "none was marked for training "
                f"(completion_only_loss={args.completion_only_loss}, assistant_only_loss={args.assistant_only_loss})"
            )
        else:
            why = f"its first trained token is number {first}, and max_length={args.max_length} cuts it off"
        return (
            f"all {len(dataset)} rows are without a token to train. Of the first row's {len(ids)} tokens, {why}. "
            f"Raise max_length or change the masks. The first row reads:\n{tokenizer.decode(ids)[:2000]}"
        )

    return explain
