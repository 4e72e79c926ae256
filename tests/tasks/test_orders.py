"""The shipped task: fixed by its seed, answers that can be read back, and a split that memorising does not pass."""

import json

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
        assert answer["name"] in _sentence(row)
        said = [size for size in orders.SIZES if f" {size} " in f" {_sentence(row).lower()}"]
        assert [answer["size"]] == (said or [orders.NO_SIZE])
        assert list(answer) == ["item", "count", "size", "name"]


def test_held_out_items_never_meet_in_training():
    train, held_out = orders.make_rows(1000), orders.make_rows(200, held_out=True)
    assert not {_answer(r)["item"] for r in train} & {_answer(r)["item"] for r in held_out}
    words = {word for r in train for word in _answer(r)["item"].split()}
    assert {word for r in held_out for word in _answer(r)["item"].split()} <= words


def test_plurals_are_undone():
    assert [orders._plural(noun) for noun in ("cake", "dress", "bench", "box", "shelf")] == [
        "cakes",
        "dresses",
        "benches",
        "boxes",
        "shelves",
    ]
    for row in orders.make_rows(300):
        answer = _answer(row)
        noun = answer["item"].split()[1]
        said = _sentence(row).lower().rstrip(".?").replace(",", "").split()
        assert (noun if answer["count"] == 1 else orders._plural(noun)) in said


def test_exact_match():
    answer = '{"item":"lemon muffin","count":2}'
    assert orders.exact_match('{"count": 2, "item": "lemon muffin"}', answer)
    assert not orders.exact_match('{"item":"lemon muffin","count":"2"}', answer)
    assert not orders.exact_match('{"item":"lemon muffin","count":2,"size":"regular"}', answer)
    assert not orders.exact_match("Sure! Here is the order.", answer)
