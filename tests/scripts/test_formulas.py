"""Formulas to learn reading from: the normal form of labels, and made ones that are drawn and kept apart."""

import argparse
import importlib
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"
MODULES = ("reading_curve", "formula_images", "formulas", "make_vlm")


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "label, shown",
    [
        (r"\label{a}x^{2}_{i}=3 \, ,\quad y", "x_i^2=3,y"),
        (r"{a+b \over c}\left.{\frac 12}\right|", r"\frac{a+b}{c}\frac{1}{2}|"),
        (
            r"{\cal L}_{\rm eff} = \mbox{Tr } {\bf p} {\rm exp}",
            r"\mathcal{L}_{\mathrm{eff}}=\mathrm{Tr}\mathbf{p}\exp",
        ),
        (r"x^{\prime\prime}_\mu + \phi'^{*}", r"x_\mu''+\phi'^*"),
        (r"\hat x{\bar{\psi}}\sqrt 2\sqrt[ 3 ]{ x }", r"\hat{x}\bar{\psi}\sqrt{2}\sqrt[3]{x}"),
        (
            r"\sum\limits_{n=0}^{\infty} a\sp {\dagger}\le\big< 0 \big>",
            r"\sum_{n=0}^\infty a^\dagger\leq\langle0\rangle",
        ),
        (r"{}^{*}T^\mu{}_\nu {x^2}^3", r"{}^*T^\mu{}_\nu{x^2}^3"),
        (r"%a 50\% %b", r"a50\%"),
        (r"x = 1 \nonumber\\", "x=1"),
        (r"\frac{a}{b", r"\frac{a}{b}"),  # what a model may write
        (r"}x^", "x"),
        ("", ""),
    ],
)
def test_normal(bench, label, shown):
    normal = bench["formulas"].normal
    assert normal(label) == shown
    assert normal(shown) == normal(bench["formulas"].apart(shown)) == shown


def test_made_formulas(bench):
    formulas, images = bench["formulas"], bench["formula_images"]
    known = [r"E=mc^2+\frac{\mathrm{vib}}{T_{ij}'}.", r"\int_0^1dx\sqrt{\hat{\phi}(x)}-\{\lambda,Q\}=[a,b]"]
    parts = images.terms(known)
    cut = [
        "E",
        "mc^2",
        r"\frac{\mathrm{vib}}{T_{ij}'}",
        r"\int_0^1dx\sqrt{\hat{\phi}(x)}",
        r"\{\lambda,Q\}",
        "[a,b]",
    ]
    assert parts == sorted(cut)
    texts = [images.invent(random.Random(seed), known, parts, 60) for seed in range(60)]
    assert len(set(texts)) > 50
    for seed, text in enumerate(texts):
        assert text == formulas.normal(text) and 0 < len(text) <= 60
        picture = images.cut(images.draw(text, random.Random(seed)), 16, random.Random(seed))
        assert picture.mode == "L" and picture.width % 16 == picture.height % 16 == 0
        grey = np.asarray(picture)
        assert grey.min() < 160, text
        edges = grey[0], grey[-1], grey[:, 0], grey[:, -1]
        assert min(edge.min() for edge in edges) > 160, text  # nothing cut off
    swapped = {images.exchanged(r"\mathrm{vib}x+2", random.Random(seed)) for seed in range(99)}
    assert len(swapped) > 20 and all(one.startswith(r"\mathrm{vib}") for one in swapped)  # but no words


def test_size_of_letters(bench):
    """A letter is as large as in the real pictures, 7 pixels without ascenders, and little around it is left."""
    images = bench["formula_images"]
    drawn = images.draw("x", random.Random(0))
    box = drawn.point(lambda level: 255 * (level < images.INK)).getbbox()
    assert box[3] - box[1] in (7, 8)
    for text, size in (("x", (16, 16)), ("x" * 40, (400, 16))):
        picture = images.cut(images.draw(text, random.Random(0)), 16)
        dark = np.asarray(picture) < images.INK
        assert picture.size == size
        assert dark.any(0).argmax() == dark.any(1).argmax() == images.MARGIN
    with pytest.raises(ValueError, match="nosuch"):
        images.draw(r"\nosuch", random.Random(0))


@pytest.fixture
def folder(bench, tmp_path):
    """Digits: those that are held out will also be made at random."""
    labels = [("7", "train"), (r"\left(7\right)\label{x}", "train"), ("3", "train"), ("x" * 151, "train")]
    labels += [(r"\matrix{1&2}", "train"), *((digit, "test") for digit in "01234589"), (r"a\\b", "test")]
    for number in range(len(labels)):
        bench["formula_images"].draw("1", random.Random(0)).save(tmp_path / f"{number}.png")
    rows = [{"image": f"{n}.png", "text": text, "split": split} for n, (text, split) in enumerate(labels)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_labelled(bench, folder):
    train, held_out, left_out = bench["formulas"].labelled(folder, 150)
    assert train == [(folder / "0.png", "7"), (folder / "1.png", "(7)")]
    assert [text for _, text in held_out] == [*"01234589"]
    assert left_out == {
        "several lines or a table": 2,
        "empty or longer than 150 characters": 1,
        "to train on, with a held-out label": 1,
    }
    rows = [json.dumps({"image": "0.png", "text": str(number)}) for number in range(203)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    train, held_out, _ = bench["formulas"].labelled(folder, 150)
    assert [text for _, text in train] == ["0", "1", "2"] and len(held_out) == 200


def texts_of(rows):
    return [row["messages"][1]["content"][0]["text"] for row in rows]


def test_what_formulas_are_trained_on(bench, folder, monkeypatch):
    """Digits, then letters, then formulas that grow, now and then as easy as before; real ones; none that is read."""
    curve = bench["reading_curve"]
    monkeypatch.setattr(curve, "at_once", lambda make_row, jobs, workers: [*map(make_row, jobs)])
    monkeypatch.setattr(curve, "REAL", 0.5)
    task = curve.formulas(argparse.Namespace(formulas=folder, workers=0, limit=5, steps=60, batch=10))
    said = texts_of(task.rows)
    texts = [text.replace(" ", "") for text in said]
    assert (
        len(texts) == 600 and task.form is bench["formulas"].normal and texts_of(task.held_out) == [*"01234"]
    )
    assert not {*"01234589"} & set(texts) and said.count("( 7 )") == texts.count("(7)") > 50
    assert set(texts[:24]) == {"6", "7"}  # what is not read of the digits
    assert all(text.isdigit() for text in texts[:48]) and any(text.isalpha() for text in texts[48:72])
    formulas = texts[72:]
    assert 150 < formulas.count("7") + formulas.count("(7)") < 350
    assert any(len(text) == 2 and text.isdigit() for text in texts[300:])
    assert max(map(len, texts[:100])) < 15 < 60 < max(map(len, texts[500:]))
