"""Runs an exported .gguf in an installed llama.cpp and compares it with the model that it was made from."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxtune.export import llama_process

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxtune.model import Model

QUESTION = "What is the capital of France? Answer in one sentence."
_PROGRAMS = ("llama-completion", "llama-cli")
_SUFFIXES = (".so", ".dylib", ".dll", ".pyd")
_PACKAGES = {"llama_cpp": "lib/*llama*", "xllamacpp": "*xllamacpp*"}


@dataclass(frozen=True)
class LlamaCpp:
    """An installed llama.cpp: a library that can be asked for logits, or a program that only answers."""

    path: Path
    library: bool


@dataclass(frozen=True)
class Verification:
    """What one file said, beside the model it was made from.

    same_tokens: llama.cpp tokenises the prompt as the model's tokenizer does; None where it was not asked.
    logit_error: difference of the prompt's logits, root mean square, over that of the logits; None without a library.
    same_choice: share of the prompt's positions with the same most likely token; None without a library.
    answer, expected: greedy continuations, llama.cpp's and the model's own.
    """

    file: str
    prompt: str
    answer: str
    expected: str
    same_tokens: bool | None = None
    logit_error: float | None = None
    same_choice: float | None = None

    def __str__(self) -> str:
        lines = [f"Verified {Path(self.file).name} in llama.cpp"]
        if self.logit_error is not None:
            lines += [
                f"  prompt     {'the same tokens' if self.same_tokens else 'OTHER TOKENS than the tokenizer gives'}",
                f"  logits     {self.logit_error:.2%} apart (root mean square), the likeliest token the same at "
                f"{self.same_choice:.0%} of the positions",
            ]
        return "\n".join(
            [*lines, f"  jaxtune    {_short(self.expected)}", f"  llama.cpp  {_short(self.answer)}"]
        )


def _short(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 160 else line[:157] + "…")


def find_llama_cpp() -> LlamaCpp | None:
    """The llama.cpp to use: the folder (or file) JAXTUNE_LLAMA_CPP, llama-cpp-python, xllamacpp, llama-cli on PATH.

    Raises:
        FileNotFoundError: JAXTUNE_LLAMA_CPP names something without a llama.cpp in it.
    """
    given = os.environ.get("JAXTUNE_LLAMA_CPP")
    if given:
        path = Path(given).expanduser()
        found = path if path.is_file() else _library(path, "*llama*")
        if found is None:
            raise FileNotFoundError(f"JAXTUNE_LLAMA_CPP={given}: there is no libllama in it")
        return LlamaCpp(found, found.name not in _PROGRAMS)
    for package, pattern in _PACKAGES.items():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin:
            found = _library(Path(spec.origin).parent, pattern)
            if found is not None:
                return LlamaCpp(found, True)
    program = next(filter(None, map(shutil.which, _PROGRAMS)), None)
    return LlamaCpp(Path(program), False) if program else None


def installed_llama_cpp() -> LlamaCpp:
    """`find_llama_cpp`; raises FileNotFoundError, with what to install, where there is none."""
    found = find_llama_cpp()
    if found is None:
        raise FileNotFoundError(
            "verify needs llama.cpp: `pip install xllamacpp`, or llama-cpp-python, or llama-cli on PATH, or the "
            "environment variable JAXTUNE_LLAMA_CPP with the folder of its libraries"
        )
    return found


def _library(folder: Path, pattern: str) -> Path | None:
    """The shared library with llama_decode in it: libllama, not libllama-common or libggml."""
    files = [file for file in sorted(folder.glob(pattern)) if any(end in file.suffixes for end in _SUFFIXES)]
    files = [file for file in files if "common" not in file.name and "mtmd" not in file.name]
    return files[0] if files else None


def verify(
    model: Model,
    files: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    question: str = QUESTION,
    max_new_tokens: int = 32,
) -> list[Verification]:
    """Asks a question of each file in llama.cpp and of the model.

    Args:
        model: what the files were made from.
        files: .gguf files.
        tokenizer: the model's by default; its chat template, if any, makes the prompt of the question.
        max_new_tokens: most tokens of the greedy answers.

    Returns:
        One result a file; a quantised file's logits are expected to differ.

    Raises:
        FileNotFoundError: no llama.cpp is installed. RuntimeError: llama.cpp does not load or run a file; what it
        said is in the message.
    """
    tokenizer = tokenizer or model.tokenizer
    found = installed_llama_cpp()
    prompt = _prompt(tokenizer, question)
    ids = np.array([tokenizer(prompt, add_special_tokens=False)["input_ids"]], np.int32)
    expected = model.generate(ids, max_new_tokens=max_new_tokens, do_sample=False)[0, ids.shape[1] :]
    text = _until_end(tokenizer, expected, model)
    if not found.library:
        return [_ask_program(found.path, Path(file), prompt, text, max_new_tokens) for file in files]
    own = np.asarray(model.logits(ids))[0]
    return [_ask_library(found.path, Path(file), prompt, ids[0], own, text, max_new_tokens) for file in files]


def _prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The question as the chat template has it, special tokens as text; a plain text begins with BOS if it should."""
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": question}]
        return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return (tokenizer.bos_token if begins else "") + question


def _until_end(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, model: Model) -> str:
    ends = [at for at, token in enumerate(ids) if token in model.stop_ids()]
    return str(tokenizer.decode(ids[: ends[0]] if ends else ids))


def _ask_library(
    library: Path, file: Path, prompt: str, ids: np.ndarray, own: np.ndarray, expected: str, new: int
) -> Verification:
    with tempfile.TemporaryDirectory(prefix="jaxtune-") as folder:
        request = {
            "library": str(library),
            "file": str(file),
            "prompt": prompt,
            "ids": ids.tolist(),
            "new": new,
        }
        logits = Path(folder) / "logits"
        done = subprocess.run(
            [sys.executable, "-I", llama_process.__file__],
            input=json.dumps(request | {"logits": str(logits)}),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{file}: llama.cpp ({library}) failed: {_reason(done)}")
        answer, theirs = json.loads(done.stdout), np.fromfile(logits, np.float32).reshape(len(ids), -1)
    width = min(own.shape[1], theirs.shape[1])  # a padded vocabulary
    own, theirs = own[:, :width], theirs[:, :width]
    return Verification(
        str(file),
        prompt,
        answer["text"],
        expected,
        answer["ids"] == ids.tolist(),
        float(np.linalg.norm(theirs - own) / np.linalg.norm(own)),
        float((theirs.argmax(1) == own.argmax(1)).mean()),
    )


def _ask_program(program: Path, file: Path, prompt: str, expected: str, new: int) -> Verification:
    """llama-cli's greedy continuation of the prompt."""
    with tempfile.TemporaryDirectory(prefix="jaxtune-") as folder:
        text = Path(folder) / "prompt.txt"
        text.write_text(prompt, "utf-8")
        command = [str(program), "-m", str(file), "-f", str(text), "-n", str(new), "--temp", "0"]
        command += ["--no-display-prompt", "-no-cnv"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{file}: {program} failed: {_reason(done)}")
    return Verification(
        str(file), prompt, done.stdout.strip().removesuffix("[end of text]").strip(), expected
    )


def _reason(done: subprocess.CompletedProcess) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    died = f"it died of signal {-done.returncode}" if done.returncode < 0 else ""
    return "; ".join(filter(None, [died, " ".join(lines[-4:])])) or f"exit status {done.returncode}"
