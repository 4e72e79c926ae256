"""Formulas made at random, and their pictures, to learn reading from.

`invent` makes a normal label (see `formulas`), of its own or of pieces of known ones with other symbols; `draw` sets
many with LaTeX (latex and dvipng, of TeX Live: texlive-latex-base, dvipng); `cut` leaves of any picture of a formula
what is one.
"""

import random
import re
import string
import subprocess
import tempfile
from pathlib import Path

from formulas import ACCENTS, FUNCTIONS, TOKEN, Atom, normal, written
from PIL import Image, ImageOps

MARGIN = 4  # pixels of white around a formula
DPI = 100  # of letters in 12 points
FINER = 2  # times, then made smaller, as the real pictures are
# The steps between neighbours of the real pictures lie between those that these leave.
FILTERS = [Image.Resampling.LANCZOS, Image.Resampling.BICUBIC, Image.Resampling.HAMMING]
WHITE = 4  # pixels around, for the filter
PALEST = 0.75  # of black
INK = 200  # grey levels below are ink
DOCUMENT = r"\documentclass[12pt]{article}\usepackage{amsmath,amssymb}\begin{document}"
WRONG = re.compile(r"^\./formulas\.tex:(\d+): ", re.MULTILINE)
PAGE = re.compile(r"\[(\d+)(?: \((\d+)\))?")  # the picture's number, and the page's where it is another

LATIN = list("abcdefghijklmnopqrstuvwxyz"), list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
GREEK = (
    [
        rf"\{name}"
        for name in "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda".split()
    ]
    + [rf"\{name}" for name in "mu nu xi pi rho sigma tau phi varphi chi psi omega".split()],
    [rf"\{name}" for name in "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega".split()],
)
EXCHANGED = {symbol: kind for kind in (*LATIN, *GREEK, list("0123456789")) for symbol in kind}
SIGNS = r"= = = = + + + - - - - , , \equiv \sim \simeq \rightarrow \leq > \approx \pm \times".split()
SPACES = [r"\,"] * 12 + [r"\;"] * 12 + [r"\ "] * 8 + [r"\quad "] * 3 + [r"\!"] * 2 + [r"\qquad "]
DIGITS_AND_LETTERS = string.digits + string.ascii_letters
CLOSING = {"(": ")", "[": "]", r"\{": r"\}"}
GROWING = CLOSING | {r"\langle": r"\rangle"}


def terms(texts: list[str]) -> list[str]:
    """The normal labels' parts between signs that stand outside all brackets."""
    parts: list[str] = []
    for text in texts:
        part, depth = [], 0
        for token in [*TOKEN.findall(text), "="]:
            depth += (token in ("{", *CLOSING)) - (token in ("}", *CLOSING.values()))
            if depth == 0 and token in SIGNS and part[-1:] not in (["_"], ["^"]):
                parts.append(written(part).rstrip(".;"))
                part = []
            else:
                part.append(token)
    return sorted(set(parts) - {""})


def invent(chance: random.Random, known: list[str], parts: list[str], longest: int) -> str:
    """A normal label of at most `longest` characters.

    Of `known` labels one that is `varied`, of `parts` some behind each other, or altogether random.
    """
    end = chance.choice(["", "", ".", ","])
    kind = chance.random()
    if kind < 0.25 and known:
        text = normal(varied(chance.choice(known), chance))
        if 0 < len(text) <= longest:
            return text
    length, text, too_long = min(longest, int(chance.triangular(15, 150, 100))) - len(end), "", 0
    while True:
        known_part = parts and chance.random() < (0.85 if kind < 0.5 else 0.15)
        more = varied(chance.choice(parts), chance) if known_part else term(chance)
        more = written([text, chance.choice(SIGNS), more] if text else [more])
        if len(more) > length:
            too_long += 1
        elif normal(more):  # not of what is edited away
            text = more
        if text and too_long > 3:
            return normal(text + end)


def varied(text: str, chance: random.Random) -> str:
    """The label with other letters, digits and signs for some, some of them gone and some new, but words as they are.

    Of formulas whose letters alone are others the model learns how each goes on, and reads no new ones.
    """
    other, edited = chance.choice([0.2, 0.5, 0.9]), chance.choice([0, 0.05, 0.15])
    upright, tokens = False, []
    for token in TOKEN.findall(text):
        upright = token == r"\mathrm" or (upright and token != "}")
        free, index = token in EXCHANGED and not upright, tokens[-1:] in (["^"], ["_"])
        if free and not index and chance.random() < edited:
            continue
        if free and chance.random() < other:
            token = chance.choice(EXCHANGED[token] if chance.random() < 0.8 else [*EXCHANGED])
        elif token in SIGNS and not index and chance.random() < other / 2:
            token = chance.choice(SIGNS)
        tokens.append(token)
        if free and chance.random() < edited:
            tokens.append(symbol(chance))
    return written(tokens)


def symbol(chance: random.Random) -> str:
    """A letter or a number, perhaps with an accent or indices."""
    kind = chance.choices(range(6), [5, 3, 4, 1, 2, 1])[0]
    if kind == 5:
        return chance.choice([*"122348", "10", r"\partial", r"\infty", r"\nabla"])
    atom = Atom(chance.choice((*LATIN, *GREEK, [r"\ell", r"\partial"])[kind]))
    if chance.random() < 0.15:
        atom.base = f"{chance.choice(ACCENTS)}{{{atom.base}}}"
    elif chance.random() < 0.1 and kind == 1:
        atom.base = rf"{chance.choice([r'\mathcal', r'\mathbf'])}{{{atom.base}}}"
    letters = [*LATIN[0], *GREEK[0], *"0123", "+", "-", "*"]
    atom.primes = chance.choices([0, 1, 2], [24, 2, 1])[0]
    if chance.random() < 0.4:
        atom.sub = written(chance.choices(letters, k=chance.choice([1, 1, 2, 3])))
    if chance.random() < 0.35:
        atom.sup = written(chance.choices([*letters, *"2222"], k=chance.choice([1, 1, 1, 2])))
    return str(atom)


def term(chance: random.Random, depth: int = 0) -> str:
    """A product, fraction, root, sum, integral, function or bracket, with terms inside."""
    if depth > 2 or chance.random() < 0.45:
        return written([symbol(chance) for _ in range(chance.randint(1, 3))])
    one, other = term(chance, depth + 1), term(chance, depth + 1)
    opening = chance.choice(["(", "(", "[", r"\{"])
    return chance.choice(
        [
            rf"\frac{{{one}}}{{{other}}}",
            rf"\frac{{{symbol(chance)}}}{{{symbol(chance)}}}{other}",
            rf"\sqrt{{{one}}}",
            written(
                [rf"\int_{chance.choice('0ab')}^{chance.choice('123')}", one, "d", chance.choice(LATIN[0])]
            ),
            written(
                [rf"\sum_{{{chance.choice('ijkmn')}={chance.choice('01')}}}^", chance.choice("NnM"), one]
            ),
            written([rf"\{chance.choice(FUNCTIONS)}", "(", one, ")"]),
            written([symbol(chance), "(", one, ",", other, ")"]),
            written([opening, one, chance.choice(["+", "-", ","]), other, CLOSING[opening]]),
            written([r"\langle", one, "|", other, r"\rangle"]),
        ]
    )


def source(text: str, chance: random.Random) -> str:
    """A normal label for LaTeX: brackets that grow, and in half of all spaces as often as in real labels."""
    tokens: list[str] = []
    opened: list[list[int]] = [[]]  # of every group that is open: its open brackets
    spacious = chance.random() < 0.5
    for token in TOKEN.findall(text):
        if tokens[-1:] in (["^"], ["_"]) and token != "{":
            tokens.append(f"{{{token}}}")
            continue
        if spacious and tokens and _may_part(tokens[-1], token):
            ends = len(opened) == 1 and (token in (",", ".") or tokens[-1] == ",")
            likely = 0.35 if ends else 0.03
            while chance.random() < likely:
                tokens.append(chance.choice(SPACES))
        tokens.append(token)
        if token == "{":
            opened.append([])
        elif token == "}":
            opened.pop()
        elif token in GROWING and tokens[-2:-1] != [r"\sqrt"]:
            opened[-1].append(len(tokens) - 1)
        elif token in GROWING.values() and opened[-1]:
            first = opened[-1].pop()
            tall = {r"\frac", r"\sum", r"\prod", r"\int"} & set(tokens[first:])
            if GROWING[tokens[first]] == token and chance.random() < (0.8 if tall else 0.3):
                tokens[first], tokens[-1] = rf"\left{tokens[first]}", rf"\right{token}"
    return written(tokens)


def _may_part(before: str, after: str) -> bool:
    """Whether a space may stand between two tokens: no argument or index begins, and none is taken from its symbol."""
    return (
        before[-1:] in ")]}=,+-" + DIGITS_AND_LETTERS and before[0] != "\\" and after not in tuple("{}^_']")
    )


def draw(sources: list[str], chance: random.Random) -> list[Image.Image | None]:
    """The pictures of formulas for LaTeX, mode L, black on white, letters of about 17 pixels; None where it finds a
    mistake in one.

    Raises:
        FileNotFoundError: latex or dvipng is not there.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # A page bears its formula's number: after a mistake LaTeX may set it later, or two on one page.
        pages = (rf"\count0={i}\shipout\hbox{{$\displaystyle {text}$}}" for i, text in enumerate(sources))
        end = rf"\count0={len(sources)}\end{{document}}"
        (folder / "formulas.tex").write_text("\n".join([DOCUMENT, *pages, end]))
        latex = ["latex", "-interaction=nonstopmode", "-file-line-error", "formulas.tex"]
        said = subprocess.run(latex, cwd=folder, capture_output=True, text=True, errors="replace").stdout
        wrong = {int(line) - 2 for line in WRONG.findall(said)}
        dvipng = f"dvipng -D {DPI * FINER} -T tight -z 1 -o %d.png formulas.dvi".split()
        said = subprocess.run(dvipng, cwd=folder, capture_output=True, text=True, check=True).stdout
        drawn = {int(page or picture): folder / f"{picture}.png" for picture, page in PAGE.findall(said)}
        return [
            _smaller(drawn[i], chance) if i in drawn and i not in wrong else None for i in range(len(sources))
        ]


def _smaller(path: Path, chance: random.Random) -> Image.Image:
    """The filter, how dark ink is, and where it begins, in fractions of a pixel, are random."""
    with Image.open(path) as picture:
        margins = (*(WHITE * FINER + chance.randrange(FINER) for _ in range(2)), *(WHITE * FINER,) * 2)
        whole = ImageOps.expand(picture.convert("L"), margins, 255)
    size = whole.width // FINER, whole.height // FINER
    box = (0, 0, size[0] * FINER, size[1] * FINER)
    dark = chance.uniform(PALEST, 1)
    return whole.resize(size, chance.choice(FILTERS), box).point(
        lambda level: 255 - round(dark * (255 - level))
    )


def cut(picture: Image.Image, cell: int, chance: random.Random | None = None) -> Image.Image:
    """The ink of a picture of a formula with a margin, on white of whole squares of `cell` pixels, mode L.

    Of 16 levels of grey, which makes a file half as large. With `chance` margins vary.
    """
    grey = picture.convert("L")
    grey = grey.crop(grey.point(lambda level: 255 * (level < INK)).getbbox())
    left, top, right, bottom = (chance.randint(1, 2 * MARGIN) if chance else MARGIN for _ in range(4))
    whole = left + grey.width + right, top + grey.height + bottom
    canvas = Image.new("L", tuple(-(-pixels // cell) * cell for pixels in whole), 255)
    canvas.paste(grey, (left, top))
    return canvas.point(lambda level: round(level / 17) * 17)
