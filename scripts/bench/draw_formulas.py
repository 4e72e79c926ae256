"""Pictures of formulas to learn reading from, as a folder of Parquet files: what reading_curve.py --drawn trains on.

    python scripts/bench/draw_formulas.py LATEX_OCR OUT --count 1000060 --workers 2

Digits, then letters, then formulas made at random that grow, many of the parts of the folder's labels (see
formula_images.py), none as it holds out (see formulas.labelled); of its pictures none. A row is a picture and its
label, with a space between any two symbols.
Needs LaTeX (TeX Live's texlive-latex-base and dvipng). What is there already is left as it is, so that a second call
goes on.
"""

import argparse
import io
import multiprocessing
import os
import random
import string
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from formula_images import cut, draw, invent, source, terms
from formulas import apart, labelled
from PIL import Image
from tqdm import tqdm

DIGITS, LETTERS = string.digits, string.ascii_letters
# What the first formulas are made of, and how many symbols at most.
BEGINNING = [(DIGITS, 1), (DIGITS, 4), (DIGITS + LETTERS, 4)]
BEGINNERS = 0.04  # of the rows, for each
# Characters, at most, of the formulas after them: at first, and once this share of the rows is there.
SHORTEST, LONGEST, GROWN = 6, 150, 0.6
EASIER = 0.25  # of the rows are as an earlier one, so that what was learned is not forgotten
CELL = 16  # pixels of an image token's side
BLOCK, SHARD = 1000, 40000  # rows of a run of LaTeX, and of a file
FEATURES = Features({"image": ImageFeature(), "text": Value("string")})


class Formulas(NamedTuple):
    """What formulas are made of: known normal labels and their parts; and labels that are read, so not made."""

    known: list[str]
    parts: list[str]
    kept_out: set[str]


def plan(share: float, given: Formulas, chance: random.Random) -> str:
    """The label of a row of which a share of all come before it: one of `BEGINNING`, then a formula like those known,
    and of their parts, that may be the longer, the later it comes."""
    share *= chance.random() if chance.random() < EASIER else 1
    stage = int(share / BEGINNERS)
    begun = BEGINNERS * len(BEGINNING)
    grown = min((share - begun) / (GROWN - begun), 1)
    while True:
        if stage < len(BEGINNING):
            symbols, most = BEGINNING[stage]
            text = "".join(chance.choices(symbols, k=chance.randint(1, most)))
        else:
            longest = int(SHORTEST + grown**2 * (LONGEST - SHORTEST))
            text = invent(chance, given.known, given.parts, longest)
        if text not in given.kept_out:
            return text


def block(job: tuple[range, int, Formulas]) -> list[dict[str, Any]]:
    """The rows of these numbers, of a count of all."""
    numbers, count, given = job
    chance = random.Random(numbers.start)
    texts = [plan(number / count, given, chance) for number in numbers]
    pictures: dict[int, Image.Image] = {}
    while missing := [i for i in range(len(texts)) if i not in pictures]:
        drawn = draw([source(texts[i], chance) for i in missing], chance)
        for i, picture in zip(missing, drawn, strict=True):
            if picture is None:  # labels have commands that LaTeX does not know
                texts[i] = plan(numbers[i] / count, given, chance)
            else:
                pictures[i] = picture
    return [row(text, pictures[i], chance) for i, text in enumerate(texts)]


def row(text: str, picture: Image.Image, chance: random.Random) -> dict[str, Any]:
    file = io.BytesIO()
    cut(picture, CELL, chance).save(file, "PNG")
    return {"image": {"bytes": file.getvalue(), "path": None}, "text": apart(text)}


def rows(numbers: range, count: int, given: Formulas, workers: int) -> Iterator[dict[str, Any]]:
    """The rows of these numbers, in their order."""
    jobs = [(numbers[i : i + BLOCK], count, given) for i in range(0, len(numbers), BLOCK)]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for made in pool.map(block, jobs):
            yield from made


def write(out: Path, count: int, given: Formulas, workers: int) -> None:
    """Files of `SHARD` rows; those that are there are left as they are.

    Raises:
        FileExistsError: there are files of another count, whose formulas grow otherwise.
    """
    out.mkdir(parents=True, exist_ok=True)
    if others := [path.name for path in out.glob("*.parquet") if not path.name.startswith(f"{count}-")]:
        raise FileExistsError(
            f"{out} has {others[0]}, not one of {count} rows; name another folder or its count"
        )
    for first in range(0, count, SHARD):
        path = out / f"{count}-{first // SHARD:05d}.parquet"
        numbers = range(first, min(first + SHARD, count))
        if path.exists():
            continue
        found = [*tqdm(rows(numbers, count, given, workers), path.name, len(numbers), unit="row")]
        columns = {name: [one[name] for one in found] for name in FEATURES}
        part = path.with_suffix(f".{os.getpid()}")
        Dataset.from_dict(columns, features=FEATURES).to_parquet(part)
        part.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("formulas", type=Path, help="metadata.jsonl (image, text, split) and its images")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=1000060, help="rows")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    real, held_out, left_out = labelled(args.formulas, LONGEST)
    print(f"{len(real)} real formulas, {len(held_out)} held out, left out: {dict(left_out)}")
    texts = [text for _, text in real]
    write(args.out, args.count, Formulas(texts, terms(texts), {text for _, text in held_out}), args.workers)


if __name__ == "__main__":
    main()
