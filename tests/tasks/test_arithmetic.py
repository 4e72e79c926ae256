"""The sums and their rewards."""

from jaxtune.tasks import arithmetic


def test_held_out_sums_are_not_trained_on():
    trained, held_out = (
        {row["prompt"][0]["content"] for row in arithmetic.make_rows(2000, held_out=part)}
        for part in (False, True)
    )
    assert trained and held_out and not trained & held_out


def test_rows_and_rewards():
    rows = arithmetic.make_rows(50)
    assert rows == arithmetic.make_rows(50) != arithmetic.make_rows(50, held_out=True)
    for row in rows:
        a, b = (
            int(word.rstrip("?"))
            for word in row["prompt"][0]["content"].split()
            if word.rstrip("?").isdigit()
        )
        assert str(a + b) == row["answer"]
    said = [[{"role": "assistant", "content": text}] for text in ("5", "2 + 3 = 5", "6", "none", " 5\n")]
    assert arithmetic.correct(said, ["5"] * 5) == [1, 1, 0, 0, 1]
    assert arithmetic.short(said) == [0.5, 0, 0.5, 0, 0.5]
