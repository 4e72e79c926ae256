"""Formulas made at random, and their pictures, to learn reading from.

`invent` makes a normal label (see `formulas`), of its own or of pieces of known ones with other symbols; `draw` renders
it with matplotlib's mathtext in Computer Modern; `cut` leaves of any picture of a formula what is one.
"""

import functools
import random

import matplotlib
import numpy as np
from formulas import ACCENTS, FUNCTIONS, TOKEN, Atom, normal, written
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import MathTextParser
from PIL import Image, ImageFilter

MARGIN = 4  # pixels of white around a formula
# Of formulas to train on: size, blur in pixels, and the power of the grey levels.
SCALE, BLUR, POWER = (0.9, 1.1), 0.8, (0.6, 1.6)
DPI = 100  # of a label in 12 points
FINER = 3  # times; what is drawn smaller sticks to whole pixels
INK = 200  # grey levels below are ink

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
CLOSING = {"(": ")", "[": "]", r"\{": r"\}"}


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

    Of `known` labels one with other symbols, of `parts` some behind each other, or altogether random.
    """
    end = chance.choice(["", "", ".", ","])
    kind = chance.random()
    if kind < 0.35 and known:
        text = normal(exchanged(chance.choice(known), chance))
        if len(text) <= longest:
            return text
    length, text = min(longest, int(chance.triangular(15, 150, 80))) - len(end), ""
    while True:
        known_part = parts and chance.random() < (0.85 if kind < 0.75 else 0.15)
        more = exchanged(chance.choice(parts), chance) if known_part else term(chance)
        more = written([text, chance.choice(SIGNS), more] if text else [more])
        if len(more) <= length:
            text = more
        elif text:
            return normal(text + end)


def exchanged(text: str, chance: random.Random) -> str:
    """The label with some of its letters and digits replaced by others of their kind, but no words."""
    share, upright, tokens = chance.choice([0.1, 0.4, 0.8]), False, []
    for token in TOKEN.findall(text):
        upright = token == r"\mathrm" or (upright and token != "}")
        swap = token in EXCHANGED and not upright and chance.random() < share
        tokens.append(chance.choice(EXCHANGED[token]) if swap else token)
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
    """A normal label as mathtext takes it: large fractions, now and then wider spaces, and brackets that grow."""
    tokens, small = TOKEN.findall(text), [False]
    opened: list[list[int]] = [[]]  # of every group that is open: its open brackets
    for place, token in enumerate(tokens):
        if token == "{":
            small.append(small[-1] or tokens[place - 1] in ("^", "_", "}", r"\frac", r"\dfrac", r"\binom"))
            opened.append([])
        elif token == "}":
            small.pop()
            opened.pop()
        elif token == r"\frac" and not small[-1]:
            tokens[place] = r"\dfrac"
        elif token in CLOSING:
            opened[-1].append(place)
        elif token in CLOSING.values() and opened[-1]:
            first = opened[-1].pop()
            tall = {r"\dfrac", r"\sum", r"\prod", r"\int"} & set(tokens[first:place])
            if tall and CLOSING[tokens[first]] == token and chance.random() < 0.8:
                tokens[first], tokens[place] = r"\left" + tokens[first], r"\right" + token
        elif token in (",", "=") and chance.random() < 0.2:
            tokens[place] += chance.choice([r"\,", r"\;", r"\ ", r"\quad "])
    return f"${written(tokens)}$"


@functools.cache
def parser() -> MathTextParser:
    return MathTextParser("agg")


def draw(text: str, chance: random.Random) -> Image.Image:
    """The picture of a normal label, mode L, black on white, letters of about 17 pixels.

    Raises:
        ValueError: mathtext does not know a command of it.
    """
    with matplotlib.rc_context({"mathtext.fontset": "cm"}):
        drawn = parser().parse(source(text, chance), dpi=DPI, prop=FontProperties(size=12 * FINER))
    return Image.fromarray(255 - np.asarray(drawn.image)).reduce(FINER)


def cut(picture: Image.Image, cell: int, chance: random.Random | None = None) -> Image.Image:
    """The ink of a picture of a formula with a margin, on white of whole squares of `cell` pixels, mode L.

    With `chance` margins, size, sharpness and the weight of the strokes vary, more than drawn and real ones differ.
    """
    grey = picture.convert("L")
    grey = grey.crop(grey.point(lambda level: 255 * (level < INK)).getbbox())
    left, top, right, bottom = [MARGIN] * 4
    if chance:
        left, top, right, bottom = (chance.randint(1, 2 * MARGIN) for _ in range(4))
        scale, power = chance.uniform(*SCALE), chance.uniform(*POWER)
        size = max(1, round(grey.width * scale)), max(1, round(grey.height * scale))
        grey = grey.resize(size, Image.Resampling.LANCZOS)
        grey = grey.point(lambda level: round(255 * (level / 255) ** power))
    whole = left + grey.width + right, top + grey.height + bottom
    canvas = Image.new("L", tuple(-(-pixels // cell) * cell for pixels in whole), 255)
    canvas.paste(grey, (left, top))
    return canvas.filter(ImageFilter.GaussianBlur(chance.uniform(0, BLUR))) if chance else canvas
