"""The shipped task: a sentence with an order in it becomes JSON.

    "Could Maya get two large lemon cakes?"
    {"item":"lemon cake","count":2,"size":"large","name":"Maya"}

Where no size is stated it is "regular". To answer, a model has to keep to the format, undo plurals, read number words
("half a dozen"), and copy names of things that it was not trained on: a variant and a noun ("lemon" + "cake") that
meet in a held-out row never meet in a training row, so rows learnt by heart do not pass. Rows are short (about 50
SmolLM2 tokens with the chat template) because the quickstart trains on a CPU.
"""

import json
import random
from typing import Any

SYSTEM = "Order to JSON."
NUM_TRAIN, NUM_HELD_OUT = 1000, 200
SEED = 3407
SHOWN = (31, 8)  # the held-out rows that are shown before and after training

# Each shelf: variants that go before any of its nouns. Nouns take a regular plural (see _plural).
SHELVES: dict[str, tuple[str, str]] = {
    "bakery": (
        "lemon apple cherry honey ginger walnut vanilla almond carrot banana",
        "cake tart cookie bun pie roll bar slice loaf",
    ),
    "kitchen": (
        "tomato cheese chicken mushroom onion spinach tuna turkey bean potato",
        "pizza salad soup sandwich wrap pasta stew snack dip",
    ),
    "bar": (
        "orange mint peach coconut berry mango pear cream oat plum",
        "juice tea soda shake drink beer cooler punch",
    ),
    "tailor": (
        "red blue green black white yellow purple grey striped brown",
        "shirt jacket hat coat dress belt skirt vest tie",
    ),
    "workshop": (
        "wooden steel plastic glass metal copper paper leather stone rubber",
        "table lamp box bowl chair frame shelf cup tray bench",
    ),
    "garden": (
        "wild winter summer desert water forest mountain dwarf rock silver",
        "rose fern palm grass bush vine plant tree flower",
    ),
}
SIZES = ("small", "medium", "large", "tiny", "huge")
NO_SIZE = "regular"
NAMES = (
    "Maya Tom Anna Ben Clara Omar Lucy Sam Nina Paul Emma Leo Sarah Max Julia Adam Rose Daniel Alice Mark "
    "Laura Peter Sophie James Helen David Kate Luis Maria John Ella Victor Grace Ivan Ruth Carlos"
).split()
NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()

# {order} is "two large lemon cakes".
TEMPLATES = (
    "{name} wants {order}.",
    "Please keep {order} for {name}.",
    "{order} for {name}, please.",
    "Hi, this is {name}, I need {order}.",
    "Can {name} have {order}?",
    "I'm {name} and I'd like {order}.",
    "Put {order} under {name}.",
    "Order for {name}: {order}.",
    "Could {name} get {order}?",
    "{name} here, please send {order}.",
    "Let {name} have {order}.",
    "We need {order} for {name}.",
    "For {name} it is {order}, thanks.",
    "My name is {name}, can I get {order}?",
    "{name} asked for {order}.",
    "Is it possible to get {order} for {name}?",
)


def make_rows(num_rows: int, *, held_out: bool = False, seed: int = SEED) -> list[dict[str, Any]]:
    """`num_rows` different rows in the conversational prompt/completion format.

    Args:
        num_rows: how many rows; the same seed gives the same rows, and a longer list starts with the shorter one.
        held_out: rows whose items (variant and noun together) appear in no training row.
        seed: of the generator.

    Returns:
        Rows `{"prompt": [system, user], "completion": [assistant]}` of `{"role", "content"}` messages.
    """
    rng = random.Random(f"orders-{seed}-{held_out}")
    items = _items(held_out)
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    while len(rows) < num_rows:
        sentence, answer = _draw(rng, items)
        if sentence not in seen:
            seen.add(sentence)
            rows.append(_row(sentence, answer))
    return rows


def exact_match(prediction: str, answer: str) -> bool:
    """True if `prediction` is JSON with exactly the keys and values of `answer` (spacing and key order are free)."""
    try:
        return json.loads(prediction) == json.loads(answer)
    except json.JSONDecodeError:
        return False


def _row(sentence: str, answer: dict[str, Any]) -> dict[str, Any]:
    content = json.dumps(answer, separators=(",", ":"))
    return {
        "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": sentence}],
        "completion": [{"role": "assistant", "content": content}],
    }


def _items(held_out: bool) -> list[tuple[str, str]]:
    """(variant, noun) pairs of one side of the split: every fifth diagonal of each shelf's table is held out."""
    pairs = []
    for variants, nouns in SHELVES.values():
        for i, variant in enumerate(variants.split()):
            for j, noun in enumerate(nouns.split()):
                if ((i + j) % 5 == 0) == held_out:
                    pairs.append((variant, noun))
    return pairs


def _draw(rng: random.Random, items: list[tuple[str, str]]) -> tuple[str, dict[str, Any]]:
    """One sentence and its answer."""
    variant, noun = rng.choice(items)
    count = rng.choice((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 15, 20, 30))
    size = rng.choice(SIZES) if rng.random() < 0.75 else NO_SIZE
    name = rng.choice(NAMES)
    words = [] if size == NO_SIZE else [size]
    words += [variant, _plural(noun) if count > 1 else noun]
    order = " ".join([_count_in_words(rng, count, words[0]), *words])
    sentence = rng.choice(TEMPLATES).format(order=order, name=name)
    answer = {"item": f"{variant} {noun}", "count": count, "size": size, "name": name}
    return sentence[0].upper() + sentence[1:], answer


def _count_in_words(rng: random.Random, count: int, next_word: str) -> str:
    """2 as "two", "2" or "a couple of"; 1 as "a", "an" or "one"."""
    if count == 1:
        return rng.choice(("one", "an" if next_word[0] in "aeio" else "a"))
    ways = [str(count)]
    if count < len(NUMBER_WORDS):
        ways += [NUMBER_WORDS[count]] * 2
    named = {2: "a couple of", 6: "half a dozen", 12: "a dozen"}
    if count in named:
        ways += [named[count]] * 2
    return rng.choice(ways)


def _plural(noun: str) -> str:
    if noun.endswith(("ch", "sh", "s", "x")):
        return noun + "es"
    if noun in ("shelf", "loaf"):
        return noun[:-1] + "ves"
    return noun + "s"
