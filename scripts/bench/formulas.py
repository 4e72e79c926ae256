"""LaTeX of formulas in one normal form, and folders of real pictures with such labels.

`normal` writes a label the way its picture looks, so that what cannot be seen counts as no error.
"""

import dataclasses
import json
import re
from collections import Counter, deque
from pathlib import Path

TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\S", re.DOTALL)
UNSEEN = re.compile(  # with their arguments
    r"\\(?:label|[hv]space|tag)\*?\s*\{[^{}]*\}|\\[hv]skip\s*-?[\d.]+\s*[a-z]{2}|\\[hv]fill?\b|\$"
)
BREAKS = re.compile(r"[\s\\]+$")  # at the end
TABLE = re.compile(r"\\begin|\\cr\b|&|\\p?matrix|\\cases|\\\\")
SIZES = "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr bigm Bigm".split()
STYLES = "displaystyle textstyle scriptstyle small scriptsize footnotesize tiny normalsize boldmath unboldmath it mit"
SPACES = "quad qquad thinspace smallskip nonumber notag limits nolimits displaylimits protect"
DROPPED = {"\\" + name for name in f"{STYLES} {SPACES}".split()} | {"~", *(rf"\{mark}" for mark in " ,;:!>/")}
FONTS = {r"\rm": r"\mathrm", r"\bf": r"\mathbf", r"\cal": r"\mathcal", r"\tt": r"\mathtt", r"\sf": r"\mathsf"}
INFIX = {r"\over": r"\frac", r"\choose": r"\binom", r"\atop": r"\overset"}
ALIASES = dict(
    re.findall(
        r"(\S+)=(\S+)",
        r"""\le=\leq \ge=\geq \ne=\neq \to=\rightarrow \lbrace=\{ \rbrace=\} \lbrack=[ \rbrack=] \vert=| \mid=|
        \Vert=\| \parallel=\| \ast=* \dag=\dagger \dots=\ldots \bot=\perp \slash=/ \colon=: \land=\wedge \sp=^ \sb=_
        \mbox=\mathrm \hbox=\mathrm \text=\mathrm \textrm=\mathrm \textbf=\mathbf \stackrel=\overset""",
    )
)
ACCENTS = [
    rf"\{name}" for name in "hat tilde bar vec dot ddot widehat widetilde overline underline breve".split()
]
ARGUMENTS = dict.fromkeys(ACCENTS, 1) | {
    r"\frac": 2,
    r"\binom": 2,
    r"\overset": 2,
    r"\sqrt": 1,
    r"\overrightarrow": 1,
}
ARGUMENTS |= dict.fromkeys([r"\mathit", r"\mathbb", *FONTS.values()], 1)
FUNCTIONS = "exp sin cos tan cot sinh cosh tanh coth ln log det lim sup max min dim ker arctan".split()


@dataclasses.dataclass
class Atom:
    """A symbol, or a command with its arguments, and what hangs on it."""

    base: str
    primes: int = 0
    sub: str = ""
    sup: str = ""

    def __str__(self) -> str:
        return self.base + _script("_", self.sub) + "'" * self.primes + _script("^", self.sup)


def normal(text: str) -> str:
    r"""A label as its picture shows it; also of what a model wrote, where braces need not match.

    Dropped are \label and what else has no ink, comments (from a % on, but not one that begins the label), spaces of
    all kinds, sizes (\left, \big, \displaystyle), the invisible delimiter (\left.) and braces that group nothing. One
    spelling stands for those that look alike: \frac for \over, \mathcal{L} for {\cal L}, \mathrm for \mbox and \rm,
    \exp for {\rm exp}, \leq for \le, x' for x^{\prime}. Lower indices stand before upper ones, arguments in braces, but
    an index of one symbol.

    >>> print(normal(r"\left( {{\cal L}^{2}_{i} \over x^\prime} \right)\, .\label{1}"))
    (\frac{\mathcal{L}_i^2}{x'}).
    """
    tokens = deque(TOKEN.findall(_seen(text)))
    return written(_atoms(tokens, ""))


def apart(text: str) -> str:
    """The label with a space between its symbols, so that each is the same tokens wherever it stands."""
    return " ".join(TOKEN.findall(text))


def _seen(text: str) -> str:
    text = re.split(r"(?<!\\)%", text.lstrip("% \t\n"))[0]
    return BREAKS.sub("", UNSEEN.sub(" ", text))


def _atoms(tokens: deque[str], closing: str) -> list[Atom]:
    """The atoms up to the token `closing`, which is taken too; "": all."""
    done: list[Atom] = []
    while tokens:
        token = tokens.popleft()
        token = ALIASES.get(token, token)
        if token == closing:
            break
        if token in FONTS:
            return done + _command(FONTS[token], [written(_atoms(tokens, closing))])
        if token in INFIX:
            return [Atom(f"{INFIX[token]}{{{written(done)}}}{{{written(_atoms(tokens, closing))}}}")]
        if token in ("^", "_", "'"):
            script = "'" if token == "'" else written(_argument(tokens))
            _hang(done, token, "" if script == "{}" else script)
        else:
            done += _one(token, tokens)
    return done


def _hang(done: list[Atom], mark: str, script: str) -> None:
    if not done:
        done.append(Atom("{}"))
    if mark != "_" and script and not re.sub(r"\\prime ?|'", "", script):
        done[-1].primes += len(re.findall(r"\\prime|'", script))
        return
    field = "sub" if mark == "_" else "sup"
    if getattr(done[-1], field):
        done[-1] = Atom(f"{{{done[-1]}}}")
    setattr(done[-1], field, script)


def _one(token: str, tokens: deque[str]) -> list[Atom]:
    """What begins with the token, without indices; several atoms where it is a group, none where it is not seen."""
    if token == "{":
        inside = _atoms(tokens, "}")
        return inside or ([Atom("{}")] if tokens and tokens[0] in ("^", "_") else [])
    if token[1:] in SIZES:
        if tokens and tokens[0] == "." and token in (r"\left", r"\right"):
            tokens.popleft()
        elif tokens and tokens[0] in "<>":
            return [Atom(r"\langle" if tokens.popleft() == "<" else r"\rangle")]
        return []
    if token in DROPPED or token == "}":
        return []
    if token == r"\sqrt" and tokens and tokens[0] == "[":
        tokens.popleft()
        token += f"[{written(_atoms(tokens, ']'))}]"
        return [Atom(f"{token}{{{written(_argument(tokens))}}}")]
    if token in ARGUMENTS:
        return _command(token, [written(_argument(tokens)) for _ in range(ARGUMENTS[token])])
    return [Atom(token)]


def _command(name: str, arguments: list[str]) -> list[Atom]:
    if name == r"\mathrm" and arguments[0] in FUNCTIONS:
        return [Atom("\\" + arguments[0])]
    return [Atom(name + "".join(f"{{{one}}}" for one in arguments))] if any(arguments) else []


def _argument(tokens: deque[str]) -> list[Atom]:
    while tokens and tokens[0] in DROPPED:
        tokens.popleft()
    if not tokens or tokens[0] == "}":
        return []
    token = tokens.popleft()
    return _one(ALIASES.get(token, token), tokens)


def _script(mark: str, text: str) -> str:
    return "" if not text else mark + text if TOKEN.fullmatch(text) else f"{mark}{{{text}}}"


def written(parts: list) -> str:
    """Atoms or tokens as one text; a command and a letter after it are kept apart."""
    text = ""
    for part in map(str, parts):
        apart = part[:1].isalpha() and re.search(r"\\[a-zA-Z]+$", text)
        text += f" {part}" if apart else part
    return text


def labelled(folder: Path, longest: int) -> tuple[list[tuple[Path, str]], list[tuple[Path, str]], Counter]:
    """Pictures and normal labels, to train on and held out, and how many rows were left out for which reason.

    Held out are the rows whose `split` is not "train"; where none is, the last 200. Left out are formulas of several
    lines, those longer than `longest` characters, and of the rows to train on those whose label is held out.
    """
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]
    held = [row.get("split", "train") != "train" for row in rows]
    if not any(held):
        held[-200:] = [True] * len(held[-200:])
    kept: tuple[list, list] = [], []
    left_out: Counter = Counter()
    for row, out in sorted(zip(rows, held, strict=True), key=lambda pair: not pair[1]):
        text = normal(row["text"])
        if TABLE.search(_seen(row["text"])):
            left_out["several lines or a table"] += 1
        elif not 0 < len(text) <= longest:
            left_out[f"empty or longer than {longest} characters"] += 1
        elif not out and any(text == other for _, other in kept[True]):
            left_out["to train on, with a held-out label"] += 1
        else:
            kept[out].append((folder / row["image"], text))
    return kept[False], kept[True], left_out
