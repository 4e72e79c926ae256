"""Formulas to learn reading from: the normal form of labels, and made ones that are drawn and kept apart."""

import argparse
import json
import random
import shutil

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

MODULES = ("reading_curve", "draw_formulas", "formula_images", "formulas")
needs_latex = pytest.mark.skipif(not (shutil.which("latex") and shutil.which("dvipng")), reason="needs LaTeX")


@pytest.fixture
def bench(bench_module):
    return {name: bench_module(name) for name in MODULES}


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
        (r"x = 1.\ ", "x=1."),
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
    assert all(text == formulas.normal(text) and 0 < len(text) <= 60 for text in texts)
    varied = [images.varied(r"\mathrm{vib}x+2", random.Random(seed)) for seed in range(99)]
    assert len({*varied}) > 50 and all(one.startswith(r"\mathrm{vib}") for one in varied)  # but no words
    assert {len(formulas.TOKEN.findall(one)) for one in varied} > {8, 9, 10}  # symbols go, and come


def test_sources(bench, monkeypatch):
    """Braces where LaTeX wants them; brackets that may grow, but not a root's; spaces that change no label."""
    images = bench["formula_images"]

    def sources(text, count=30):
        chance = random.Random(0)
        return {images.source(text, chance) for _ in range(count)}

    assert {"a=b,c.", r"a=b\;,c.", r"a=b,\quad c.", r"a=\,b,c."} < sources("a=b,c.", 4000)
    known = [r"\frac{x_i^2}{\sqrt[3]{b}}y_{ab}^*\hat{\phi}'=[T_{ij}'(a),\mathrm{Tr}]"]
    for text in known + [images.invent(random.Random(seed), known, known, 80) for seed in range(60)]:
        made = sources(text)
        assert {bench["formulas"].normal(one) for one in made} == {text}
    monkeypatch.setattr(images, "SPACES", [""])
    assert sources(r"x_\min^\dagger|a|") == {r"x_{\min}^{\dagger}|a|"}
    growing = {
        r"(\frac{a}{b})": r"\left(\frac{a}{b}\right)",
        "[c]": r"\left[c\right]",
        r"\langle0|a\rangle": r"\left\langle0|a\right\rangle",
    }
    for text, grown in growing.items():
        assert sources(text) == {text, grown}
    for text in ("(a_{i)}", r"\sqrt[3]{b}", r"(\frac{a}{b}]", "x^{(}"):
        assert sources(text) == {text}


@needs_latex
def test_pictures(bench):
    """What LaTeX takes is drawn whole, and what it does not is none, whatever it does to the pages after it; a letter
    is as large as in real pictures, 7 pixels without ascenders."""
    images = bench["formula_images"]
    known = [r"E=mc^2+\frac{\mathrm{vib}}{T_{ij}'}.", r"\int_0^1dx\sqrt{\hat{\phi}(x)}-\{\lambda,Q\}=[a,b]"]
    parts = images.terms(known)
    texts = [images.invent(random.Random(seed), known, parts, 60) for seed in range(40)]
    sources = [images.source(text, random.Random(0)) for text in ["x", "x" * 40, *texts]]
    wrong = [r"\nosuch", r"a_\min", "b}", "y\\"]
    sources[5:5] = wrong
    drawn = images.draw([*sources, "x" * 40], random.Random(0))
    end = 5 + len(wrong)
    assert drawn[5:end] == [None] * len(wrong) and None not in drawn[:5] + drawn[end:]
    assert abs(drawn[-1].width - drawn[1].width) <= 1  # not another's
    for picture in filter(None, drawn):
        grey = np.asarray(images.cut(picture, 16, random.Random(0)))
        assert grey.min() < 160 and grey.shape[0] % 16 == grey.shape[1] % 16 == 0
        edges = grey[0], grey[-1], grey[:, 0], grey[:, -1]
        assert min(edge.min() for edge in edges) > 160  # nothing cut off
    for picture, size in zip(drawn, ((16, 16), (384, 16))):
        box = picture.point(lambda level: 255 * (level < images.INK)).getbbox()
        assert box[3] - box[1] in (7, 8)
        grey = np.asarray(images.cut(picture, 16))
        dark = grey < images.INK
        assert grey.shape == size[::-1] and dark.any(0).argmax() == dark.any(1).argmax() == images.MARGIN


def square():
    return Image.new("L", (8, 8), 0)


@pytest.fixture
def folder(bench, tmp_path):
    """Digits: those that are held out will also be made at random."""
    labels = [("7", "train"), (r"\left(7\right)\label{x}", "train"), ("3", "train"), ("x" * 151, "train")]
    labels += [(r"\matrix{1&2}", "train"), *((digit, "test") for digit in "01234589"), (r"a\\b", "test")]
    for number in range(len(labels)):
        square().save(tmp_path / f"{number}.png")
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


def test_what_is_drawn(bench, folder, monkeypatch):
    """Digits, then letters, then formulas that grow, now and then as easy as before; none that is read."""
    drawing, formulas = bench["draw_formulas"], bench["formulas"]
    refused = []

    def draw(sources, chance):
        refused.append(len(sources))
        return [None if len(refused) % 2 and i % 2 else square() for i in range(len(sources))]

    monkeypatch.setattr(drawing, "draw", draw)
    real, held_out, _ = formulas.labelled(folder, 150)
    known = [text for _, text in real]
    given = drawing.Formulas(known, bench["formula_images"].terms(known), {text for _, text in held_out})
    rows = [
        row for first in range(0, 600, 60) for row in drawing.block((range(first, first + 60), 600, given))
    ]
    said = [row["text"] for row in rows]
    texts = [text.replace(" ", "") for text in said]
    assert len(texts) == 600 and refused[:2] == [60, 30]  # those that LaTeX refused are other ones then
    assert not {*"01234589"} & set(texts) and said.count("( 7 )") == texts.count("(7)") > 20
    assert set(texts[:24]) == {"6", "7"}  # what is not read of the digits
    assert all(text.isdigit() for text in texts[:48]) and any(text.isalpha() for text in texts[48:72])
    assert any(len(text) == 2 and text.isdigit() for text in texts[300:])
    assert max(map(len, texts[:100])) < 15 < 60 < max(map(len, texts[500:]))


def test_what_is_trained_on(bench, folder, tmp_path, monkeypatch):
    """All rows drawn but those to read, in their order, the real ones among the last fifth; a second call leaves files
    as they are."""
    drawing, curve = bench["draw_formulas"], bench["reading_curve"]
    monkeypatch.setattr(curve, "ALIKE", 2)
    made = [drawing.row(str(number), square(), random.Random(0)) for number in range(52)]
    monkeypatch.setattr(drawing, "rows", lambda numbers, *_: (made[number] for number in numbers))
    monkeypatch.setattr(drawing, "SHARD", 20)
    drawn = tmp_path / "drawn"
    drawing.write(drawn, 52, drawing.Formulas([], [], set()), 1)
    assert sorted(path.name for path in drawn.iterdir()) == [f"52-0000{i}.parquet" for i in range(3)]
    monkeypatch.setattr(drawing, "rows", lambda *_: 1 / 0)
    drawing.write(drawn, 52, drawing.Formulas([], [], set()), 1)
    with pytest.raises(FileExistsError, match=r"52-0000\d.parquet, not one of 60 rows"):
        drawing.write(drawn, 60, drawing.Formulas([], [], set()), 1)
    texts = load_dataset("parquet", data_files=str(drawn / "*.parquet"), split="train")["text"]
    assert [text.replace(" ", "") for text in texts] == [str(number) for number in range(52)]

    given = argparse.Namespace(formulas=folder, drawn=drawn, limit=5, epochs=2, real=2, seed=0)
    task = curve.formulas(given)
    answers = [text.replace(" ", "") for text in texts_of(task.rows)]
    real = [text for _, text in bench["formulas"].labelled(folder, 150)[0]]
    numbers = [str(number) for number in range(50)]
    assert answers[:40] == numbers[:40] and sorted(answers[40:]) == sorted([*numbers[40:], *real, *real])
    assert answers[40:50] != numbers[40:] and task.form is bench["formulas"].normal
    assert task.options["num_train_epochs"] == 2 and task.options["train_sampling_strategy"] == "sequential"
    assert texts_of(task.held_out) == [*"01234"] and texts_of(task.alike) == ["5 0", "5 1"]
