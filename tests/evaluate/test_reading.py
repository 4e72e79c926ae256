"""Error rates by jiwer, and rows as questions with answers."""

import pytest
import tiny_processors
import tiny_vision

from jaxtune.data.images import ImageError
from jaxtune.evaluate.reading import error_rates, examples, read_images
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
    with pytest.raises(ImageError, match="row 1 has no image to read"):
        examples([rows[0], {"messages": [{"role": "user", "content": "read"}, talk[1]]}])


def test_images_are_checked_before_the_first_reading(tmp_path):
    """All rows with a bad image are named; one that goes bad later is, too."""
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for file in files:
        tiny_vision.picture(60, 60).save(file)
    asked = examples([{"image": str(file), "text": "word"} for file in files], "read")
    processor, calls = tiny_processors.make_processor(tmp_path / "processor"), []

    def generate(input_ids, **_):
        calls.append(len(input_ids))
        files[4].unlink()
        return input_ids

    model = tiny_processors.stand_in(generate=generate)
    for number in (2, 3):
        files[number].write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"(?s)2 of 5 rows cannot be used:\nrow 2: .*\nrow 3: "):
        read_images(model, processor, asked, batch_size=2, progress=False)
    assert not calls
    for number in (2, 3):
        tiny_vision.picture(60, 60).save(files[number])
    with pytest.raises(ImageError, match=r"^row 4: .* does not exist"):
        read_images(model, processor, asked, batch_size=4, progress=False)
    assert calls == [4]


def test_the_table_of_a_comparison():
    rates = {"base": error_rates(["ab"], ["xy"]), "adapter": error_rates(["ab"], ["ab"])}
    rows = [{"row": 0, "reference": "a|b", "readings": {"adapter": {"text": "a\nb", "cer": 0.5}}}]
    lines = markdown(rates, rows).splitlines()
    assert lines[2:4] == ["| base | 100.00% | 100.00% | 0.0% |", "| adapter | 0.00% | 0.00% | 100.0% |"]
    assert lines[-1] == "| 0 | 50% | a\\|b | a b |"
