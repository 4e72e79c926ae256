"""What a person wants to see of prepared data before training: numbers, and one row in colour."""

from dataclasses import dataclass
from itertools import pairwise

import datasets
import numpy as np
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from jaxtune.data.columns import IGNORE, ragged_column
from jaxtune.data.prepare import preparation_report

TRAINED, MASKED = "bold green", "dim"


@dataclass(frozen=True)
class TokenStatistics:
    """Sizes of a prepared dataset, in tokens.

    Attributes:
        rows: rows kept.
        tokens: of all rows.
        trained: tokens with a label.
        mean: of row lengths.
        percentiles: percent -> row length, for 5, 50, 95 and 100.
        dropped, truncated: rows that preparation left out or cut.
    """

    rows: int
    tokens: int
    trained: int
    mean: float
    percentiles: dict[int, int]
    dropped: int
    truncated: int

    @property
    def trained_fraction(self) -> float:
        """Share of the tokens that is trained, 0 to 1."""
        return self.trained / self.tokens


def token_statistics(dataset: datasets.Dataset) -> TokenStatistics:
    """Count a prepared dataset (columns input_ids, labels)."""
    ids, labels = ragged_column(dataset, "input_ids"), ragged_column(dataset, "labels")
    report = preparation_report(dataset)
    marks = (5, 50, 95, 100)
    lengths = np.percentile(ids.lengths, marks, method="inverted_cdf")
    return TokenStatistics(
        rows=len(ids),
        tokens=int(ids.lengths.sum()),
        trained=int((labels.values != IGNORE).sum()),
        mean=float(ids.lengths.mean()),
        percentiles={mark: int(length) for mark, length in zip(marks, lengths, strict=True)},
        dropped=report.dropped if report else 0,
        truncated=report.truncated if report else 0,
    )


def render_example(tokenizer: PreTrainedTokenizerBase, row: dict[str, list[int]]) -> Text:
    """A row as text: trained tokens green, the others dim.

    Args:
        row: input_ids and labels of one row.

    Returns:
        rich Text; its plain text is the decoded row, special tokens included.
    """
    ids, labels = np.asarray(row["input_ids"]), np.asarray(row["labels"])
    trained = labels != IGNORE
    edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
    text, shown = Text(), 0
    for start, stop in pairwise(edges):
        # Decoding up to `stop` and taking what is new keeps spaces that decoding a piece alone would lose.
        until = str(tokenizer.decode(ids[:stop], skip_special_tokens=False))
        text.append(until[shown:], style=TRAINED if trained[start] else MASKED)
        shown = len(until)
    return text
