"""Answer checkers: what a completion answers, and whether that is the reference's answer.

A checker reads a reference once and each completion once; what it read can be compared and shown. What stands before
the last </think> is no answer, except for "gsm8k", which is verl's rule to the letter.
"""

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any, NamedTuple

from jaxtune.evaluate.config import CheckerName

TAIL = 300  # characters of a completion that verl looks at
_BOLD = re.compile(r"\*\*(.+?)\*\*")
_STRICT = re.compile(r"#### (-?[0-9.,]+)")
# A minus belongs to the number unless something stands before it ("5-3"); commas between three digits do too.
_NUMBER = re.compile(r"(?:(?<![\w.)\]}])-)?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


class Checker(NamedTuple):
    """One way to check.

    reference: text of the data -> its answer, None where it has none. found: completion -> its answer, None where it
    has none. same: (reference, found) -> whether they mean the same, also for two that were found. show: answer ->
    text. expects: what a reference must hold.
    """

    reference: Callable[[str], Any]
    found: Callable[[str], Any]
    same: Callable[[Any, Any], bool]
    show: Callable[[Any], str]
    expects: str


def checker(name: CheckerName) -> Checker:
    """The checker of that name.

    Raises:
      ImportError: "math" without math-verify.
    """
    if name == "gsm8k":
        return Checker(
            strict_answer, lambda text: strict_answer(text[-TAIL:]), str.__eq__, str, '"#### " and a number'
        )
    if name == "number":
        return Checker(
            lambda text: last_number(text.rpartition("####")[2]),
            lambda text: last_number(after_thinking(text)),
            Decimal.__eq__,
            lambda number: f"{number:f}",
            "a number",
        )
    if name == "exact":
        return Checker(_words, lambda text: _words(after_thinking(text)), str.__eq__, str, "some text")
    return _math()


def strict_answer(text: str) -> str | None:
    """GSM8K's number after the last "#### ", without its commas, as verl takes it; None where there is none.

    >>> strict_answer("6 * 200 = 1200\\n#### 1,200"), strict_answer("####5"), strict_answer("The answer is 5")
    ('1200', None, None)
    """
    found = _STRICT.findall(text)
    return found[-1].replace(",", "") if found else None


def last_number(text: str) -> Decimal | None:
    """The last number of a text, None where there is none.

    >>> last_number("5-3 leaves $1,200.50."), last_number("from -4 to -2"), last_number("none")
    (Decimal('1200.50'), Decimal('-2'), None)
    """
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("$", "")) if found else None


def after_thinking(text: str) -> str:
    """What follows the last </think>; nothing where a <think> does not end; else the whole text."""
    _, end, answer = text.rpartition("</think>")
    if end:
        return answer
    return "" if "<think>" in text else text


def _words(text: str) -> str | None:
    """Words in lower case, divided by one space, without the last full stop."""
    return " ".join(text.casefold().split()).removesuffix(".") or None


def _math() -> Checker:
    """math-verify: answers in LaTeX, those in a box first, else plain expressions."""
    from jaxtune.rl.rewards import load_math_verify

    library = load_math_verify()
    from math_verify import ExprExtractionConfig

    def reference(text: str) -> Any:
        written = text if "$" in text or "\\boxed" in text else f"${text}$"
        return library.parse(written, None) or None

    def found(text: str) -> Any:
        plain = _BOLD.sub(r"\1", after_thinking(text))
        return library.parse(plain, [library.latex(False), ExprExtractionConfig()]) or None

    return Checker(
        reference, found, library.verify, lambda answer: str(answer[-1]), "a number or an expression"
    )
