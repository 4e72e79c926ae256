"""What counts as an answer, and when two are the same."""

import json

import pytest

from jaxtune.evaluate.checkers import after_thinking, checker, last_number


def right(check, reference: str, completion: str) -> bool | None:
    """Whether a completion is right, None where it has no answer."""
    answer = check.found(completion)
    return None if answer is None else check.same(check.reference(reference), answer)


@pytest.mark.parametrize(
    "completion, expected",
    [
        ("so\n#### 18", True),
        ("#### 17\nno:\n#### 18", True),  # the last
        ("#### 18 is it\n#### 17", False),
        ("#### 18.", False),  # letter by letter: verl takes the full stop into the number
        ("#### 18.0", False),
        ("#### $18", None),
        ("####18", None),
        ("The answer is 18", None),
        ("#### 18" + "x" * 293, True),  # the last 300 characters count
        ("#### 18" + "x" * 294, None),
        ("", None),
    ],
)
def test_gsm8k_strict(completion, expected):
    assert right(checker("gsm8k"), "16 - 3 = 13\n#### 18", completion) is expected


def test_gsm8k_strict_takes_commas_out():
    check = checker("gsm8k")
    assert right(check, "#### 1,200", "#### 1200") and right(check, "#### 1200", "#### 1,200")
    assert right(check, "#### -5", "#### -5") and not right(check, "#### -5", "#### 5")
    assert check.reference("no answer") is None


def test_gsm8k_strict_on_the_data_itself(shared_data):
    file = shared_data / "gsm8k" / "test.jsonl"
    if not file.is_file():
        pytest.skip("the shared data has no gsm8k")
    answers = [json.loads(line)["answer"] for line in file.read_text("utf-8").splitlines()]
    check, loose = checker("gsm8k"), checker("number")
    assert len(answers) == 1319
    for answer in answers:
        # the data's own form: the last line is "#### " and the number, nothing else
        last = answer.splitlines()[-1]
        assert last.startswith("#### ")
        assert check.reference(answer) == last[5:].replace(",", "")
        assert right(check, answer, answer) and right(loose, answer, answer)
        assert float(loose.reference(answer)) == float(check.reference(answer))


@pytest.mark.parametrize(
    "text, number",
    [
        ("The answer is 18.", "18"), ("$1,200.50", "1200.50"), ("-$4", "-4"), ("5-3=2", "2"), ("20-5", "5"),
        ("(-3)", "-3"), ("1, 2,3", "3"), ("12,345,678 people", "12345678"), ("1,2345", "2345"), ("-.5", "-.5"),
        ("**42**", "42"), ("18 % of 3.50 $.", "3.50"), ("x", None), ("", None), (".", None),
    ],
)  # fmt: skip
def test_last_number(text, number):
    found = last_number(text)
    assert (None if found is None else float(found)) == (None if number is None else float(number))


def test_number():
    check = checker("number")
    assert right(check, "text\n#### 18", "so it is 18.0") and right(check, "18", "<think>5</think>$18.00")
    assert right(check, "18", "<think>18") is None  # thinking that does not end
    assert check.show(check.found("1,200.50")) == "1200.50"
    assert check.reference("none") is None


def test_exact():
    check = checker("exact")
    assert right(check, "Paris", " paris.\n") and right(check, "New  York", "<think>x</think>new york")
    assert right(check, "Paris", "It is Paris.") is False
    assert right(check, "Paris", " ") is None


def test_after_thinking():
    assert after_thinking("<think>a</think>b</think>c") == "c" and after_thinking("a</think>b") == "b"
    assert after_thinking("<think>a") == "" and after_thinking("a") == "a"


class TestMath:
    @pytest.fixture(autouse=True)
    def needs_math_verify(self):
        pytest.importorskip("math_verify")

    @pytest.mark.parametrize(
        "reference, completion, expected",
        [
            ("073", r"so \boxed{73}", True),  # AIME writes three digits
            ("204", r"\boxed{204}.", True),
            ("204", "The answer is 204.", True),
            ("204", "**Answer: 204**", True),
            ("204", r"\boxed{205}", False),
            (r"\frac{1}{3}", r"\boxed{1/3}", True),
            (r"$\frac{1}{3}$", "it is 0.333", False),
            (r"The area is $\boxed{3\sqrt{13}}$.", r"thus $3 \sqrt{13}$", True),
            (r"3 \sqrt{13}", r"\boxed{\sqrt{117}}", True),
            ("(1,2]", r"\boxed{(1,2]}", True),
            ("12", r"\boxed{12\text{ cm}}", True),
            ("12", r"$x=3$, so $\boxed{12}$ and $y=4$", True),
            ("5", r"<think>\boxed{4}</think> $\boxed{5}$", True),
            ("5", r"<think>\boxed{5}", None),
            ("5", "no idea", None),
        ],
    )
    def test_equal(self, reference, completion, expected):
        assert right(checker("math"), reference, completion) is expected


def test_math_without_math_verify_says_what_to_install(monkeypatch):
    from jaxtune.rl import rewards

    monkeypatch.setattr(rewards.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install math-verify"):
        checker("math")
