"""Word and character error rates, by jiwer."""

from collections.abc import Sequence
from typing import NamedTuple

import jiwer


class ErrorRates(NamedTuple):
    """Of all texts together, 0 is best.

    cer: characters to insert, delete or change (Levenshtein), over the characters of the references; above 1 where a
    model writes much that is not there. wer: the same of words. exact: share of texts without an error.
    """

    cer: float
    wer: float
    exact: float


def plain(text: str, ignore_case: bool = False) -> str:
    """A text with one space wherever there are spaces or line breaks, and none at its ends."""
    return " ".join((text.casefold() if ignore_case else text).split())


def error_rates(
    references: Sequence[str], readings: Sequence[str], *, ignore_case: bool = False
) -> ErrorRates:
    """How far readings are from what stands there; spaces and line breaks are one space (see `plain`).

    Raises:
        ValueError: there is nothing to compare, or a reference is empty.

    >>> error_rates(["12 apples", "two"], ["12 apple", "two"])
    ErrorRates(cer=0.08333333333333333, wer=0.3333333333333333, exact=0.5)
    """
    if not references or len(references) != len(readings):
        raise ValueError(
            f"expected as many readings as references; came {len(readings)} and {len(references)}"
        )
    want, said = ([plain(text, ignore_case) for text in texts] for texts in (references, readings))
    if "" in want:
        raise ValueError(f"reference {want.index('')} is empty; an error rate needs text to compare with")
    exact = sum(a == b for a, b in zip(want, said)) / len(want)
    return ErrorRates(float(jiwer.cer(want, said)), float(jiwer.wer(want, said)), exact)
