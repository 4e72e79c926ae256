"""The shipped task: fixed by its seed, answers that can be read back, and a split that memorising does not pass."""

import json
import re

from jaxtune.tasks import orders


def _sentence(row):
    return row["prompt"][-1]["content"]


def _answer(row):
    return json.loads(row["completion"][0]["content"])


def test_same_seed_same_rows_and_prefix():
    assert orders.make_rows(20) == orders.make_rows(40)[:20]
    assert orders.make_rows(20) != orders.make_rows(20, seed=1)


def test_rows_are_distinct_and_named_values_stand_in_the_sentence():
    rows = orders.make_rows(orders.NUM_TRAIN)
    assert len({_sentence(row) for row in rows}) == orders.NUM_TRAIN
    for row in rows:
        answer = _answer(row)
        assert answer["item"].split()[0] in _sentence(row).lower()
        assert answer.get("name", "") in _sentence(row)
        assert answer.get("size", "") in _sentence(row).lower()
        assert set(answer) <= {"item", "count", "size", "name", "time"}


def test_held_out_items_never_meet_in_training():
    train, held_out = orders.make_rows(1000), orders.make_rows(200, held_out=True)
    assert not {_answer(r)["item"] for r in train} & {_answer(r)["item"] for r in held_out}
    words = {word for r in train for word in _answer(r)["item"].split()}
    assert {word for r in held_out for word in _answer(r)["item"].split()} <= words


def test_times_are_24_hours():
    times = [(_sentence(r), _answer(r)["time"]) for r in orders.make_rows(1000) if "time" in _answer(r)]
    assert len(times) > 200
    for sentence, time in times:
        said = re.search(r"(\d+)(?::(\d\d))? (am|pm)|noon", sentence)
        assert said, sentence
        if said[0] == "noon":
            assert time == "12:00"
            continue
        hour = int(said[1]) % 12 + (12 if said[3] == "pm" else 0)
        assert time == f"{hour:02d}:{said[2] or '00'}"


def test_exact_match():
    answer = '{"item":"lemon muffin","count":2}'
    assert orders.exact_match('{"count": 2, "item": "lemon muffin"}', answer)
    assert not orders.exact_match('{"item":"lemon muffin","count":"2"}', answer)
    assert not orders.exact_match('{"item":"lemon muffin","count":2,"size":null}', answer)
    assert not orders.exact_match("Sure! Here is the order.", answer)
