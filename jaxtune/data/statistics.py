"""What a person wants to see of prepared data before training: numbers, and one row in colour."""

from dataclasses import dataclass
from itertools import pairwise

import datasets
import numpy as np
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from jaxtune.data.columns import IGNORE, ragged_column
from jaxtune.data.prepare import preparation_report

TRAINED, MASKED, IMAGE = "bold green", "dim", "cyan"


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


def render_example(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, list[int]], image_token_id: int | None = None
) -> Text:
    """A row as text: trained tokens green, the others dim, images cyan.

    Args:
        row: input_ids and labels of one row.
        image_token_id: the token that stands for a part of an image; a run of it is shown once, with its place.

    Returns:
        rich Text; its plain text is the decoded row, special tokens included, but for the images.
    """
    ids, labels = np.asarray(row["input_ids"]), np.asarray(row["labels"])
    styles = np.where(ids == image_token_id, IMAGE, np.where(labels != IGNORE, TRAINED, MASKED))
    edges = [0, *(np.flatnonzero(styles[1:] != styles[:-1]) + 1).tolist(), len(ids)]
    text, shown = Text(), 0
    for start, stop in pairwise(edges):
        # Decoding up to `stop` and taking what is new keeps spaces that decoding a piece alone would lose.
        until = str(tokenizer.decode(ids[:stop], skip_special_tokens=False))
        style = str(styles[start])
        if style == IMAGE:
            text.append(f"[image: {stop - start} tokens, {start} to {stop - 1}]", style=style)
        else:
            text.append(until[shown:], style=style)
        shown = len(until)
    return text
