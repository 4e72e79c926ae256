"""Error rates by jiwer, and rows as questions with answers."""

import pytest
import tiny_vision

from jaxtune.data.images import ImageError
from jaxtune.evaluate.reading import error_rates, examples
from jaxtune.evaluate.reading.job import markdown


def distance(a, b) -> int:
    """Levenshtein's, by the book."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        before, row = row, [i]
        for j, right in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (left != right)))
    return row[-1]


def test_error_rates_are_edits_over_references():
    want = ["Invoice 3407\nTotal: $318.12", "ocean bread", "99 - 7"]
    said = ["Invoice 347 Total: $318.12", "ocean  bread", "nothing at all"]
    rates = error_rates(want, said)
    flat = [(" ".join(a.split()), " ".join(b.split())) for a, b in zip(want, said, strict=True)]
    assert rates.cer == pytest.approx(sum(distance(a, b) for a, b in flat) / sum(len(a) for a, _ in flat))
    words = [(a.split(), b.split()) for a, b in flat]
    assert rates.wer == pytest.approx(sum(distance(a, b) for a, b in words) / sum(len(a) for a, _ in words))
    assert rates.exact == pytest.approx(1 / 3)
    assert error_rates(["Ab"], ["aB"], ignore_case=True).exact == 1.0
    assert error_rates(["ab"], [""]) == (1.0, 1.0, 0.0)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="as many readings as references; came 1 and 2"):
        error_rates(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="reference 1 is empty"):
        error_rates(["a", " "], ["a", "b"])


def test_rows_as_questions_with_answers():
    image = tiny_vision.picture(30, 30)
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "read"}]
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": "one"}]
    rows = [
        {"messages": [*talk, talk[0], {"role": "assistant", "content": "two"}]},
        {"prompt": talk[:1], "completion": [{"role": "assistant", "content": "three"}]},
        {"image": image, "text": "four"},
    ]
    found = examples(rows, "read")
    assert [one.reference for one in found] == ["two", "three", "four"]
    assert [len(one.document.images) for one in found] == [2, 1, 1]
    asked = [part.get("text", part["type"]) for part in found[2].document.prompt[-1]["content"]]
    assert asked == ["image", "read"]
    with pytest.raises(ImageError, match="row 0 does not end with an assistant's answer"):
        examples([{"messages": talk[:1]}])
    with pytest.raises(ImageError, match="row 0: no text in image"):
        examples([{"image": image}], "read")


def test_the_table_of_a_comparison():
    rates = {"base": error_rates(["ab"], ["xy"]), "adapter": error_rates(["ab"], ["ab"])}
    rows = [{"row": 0, "reference": "a|b", "readings": {"adapter": {"text": "a\nb", "cer": 0.5}}}]
    lines = markdown(rates, rows).splitlines()
    assert lines[2:4] == ["| base | 100.00% | 100.00% | 0.0% |", "| adapter | 0.00% | 0.00% | 100.0% |"]
    assert lines[-1] == "| 0 | 50% | a\\|b | a b |"
