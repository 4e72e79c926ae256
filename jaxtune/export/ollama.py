"""An Ollama Modelfile: FROM, TEMPLATE, stop parameters, SYSTEM; and the commands that run an exported file.

Ollama does not read the Jinja template inside a .gguf; it wants one in Go's text/template, and knows by itself only
those few whose Jinja is, nearly letter for letter, one of its list. So the Go template is made here from what the
tokenizer's own template renders: a few conversations show what it puts around each role's text (`read_turns`), and
others prove that this reading is the whole template; one that does more than that gets no TEMPLATE and the Modelfile
says so. Calls of tools are not in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
# generation_config.json's names of what Ollama calls otherwise, or the same.
_PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
# Llama 3 shows a date; without one to show it is today's in transformers, which must not stay in a Modelfile.
_DATE = "26 Jul 2024"


@dataclass(frozen=True)
class Turns:
    """What a chat template puts around the messages.

    begin: before a conversation without system message (BOS and default system message included).
    system: (before, after) of a system message; None where the template takes none.
    in_user: the system message stands in the first user turn, behind that one's opening, not before it.
    user, assistant: (before, after) of a turn's text. between: what a user turn that is not the first has in front.
    prompt: what asks for an answer, after the last user turn.
    """

    begin: str
    system: tuple[str, str] | None
    in_user: bool
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str
    between: str = ""

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation that ends with the user's turn, ready for the answer."""
        system, rest = None, list(messages)
        if self.system and rest[0]["role"] == "system":
            system = rest.pop(0)["content"].join(self.system)
        out = self.begin if system is None or self.in_user else system
        for number, message in enumerate(rest):
            before, after = getattr(self, message["role"])
            if message["role"] == "user":
                before = (self.between if number else "") + before
                before += system if self.in_user and system is not None and number == 0 else ""
            out += before + message["content"] + after
        return out + self.prompt


_SYSTEM = {"role": "system", "content": "SystemText"}
_CHAT = [
    {"role": role, "content": text}
    for role, text in (
        ("user", "FirstQuestion"),
        ("assistant", "FirstAnswer"),
        ("user", "SecondQuestion"),
        ("assistant", "Second\n\nanswer, of two lines."),
        ("user", "What else?"),
    )
]


def read_turns(tokenizer: PreTrainedTokenizerBase) -> Turns | None:
    """What the tokenizer's chat template puts around the messages; None where it has none or does more than that."""
    source = tokenizer.chat_template
    if not source or ("strftime_now" in source and "date_string" not in source):
        return None
    plain = _split(tokenizer, _CHAT[:3])
    if plain is None:
        return None
    first, to_answer, to_question, prompt = plain
    # A template may close a conversation otherwise than a turn: then the end of a question counts as the answer's
    # opening, and a question's opening is what the first one and the next have in common.
    user_end = _tail(tokenizer, _CHAT[:1], to_answer)
    answer_end = _tail(tokenizer, _CHAT[:2], to_question)
    opening = to_question.removeprefix(answer_end) if answer_end else _common_end(first, to_question)
    answer_end = to_question.removesuffix(opening)
    if not (first.endswith(opening) and prompt.startswith(user_end)):
        return None
    begin = first.removesuffix(opening)
    with_system = _split(tokenizer, [_SYSTEM, *_CHAT[:3]])
    system, in_user = None, False
    if with_system is not None:
        before, after = with_system[:2]
        if after.endswith(opening):
            system = before, after.removesuffix(opening)
        elif before.startswith(begin + opening):
            system, in_user = (before.removeprefix(begin + opening), after), True
        else:
            return None
    turns = Turns(
        begin,
        system,
        in_user,
        (opening, user_end),
        (to_answer.removeprefix(user_end), answer_end),
        prompt.removeprefix(user_end),
    )
    probes = [_CHAT[:1], _CHAT[:3], _CHAT]
    probes += [[_SYSTEM, *chat] for chat in probes] if system else []
    return turns if all(turns.render(chat) == _render(tokenizer, chat) for chat in probes) else None


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], prompt: bool = True) -> str | None:
    """What the template makes of a conversation; None if it refuses it."""
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt, date_string=_DATE
            )
        )
    except (TemplateError, ValueError, TypeError):
        return None


def _split(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[str] | None:
    """What stands before, between and behind the messages' texts; None where one of them is not shown once."""
    left, pieces = _render(tokenizer, messages) or "", []
    for message in messages:
        if left.count(message["content"]) != 1:
            return None
        piece, left = left.split(message["content"])
        pieces.append(piece)
    return [*pieces, left]


def _tail(tokenizer: PreTrainedTokenizerBase, messages: list[Message], following: str) -> str:
    """What closes the last of the messages, where that is how `following`, the text before the next one, begins."""
    shown = _render(tokenizer, messages, prompt=False)
    tail = (shown or "").rpartition(messages[-1]["content"])[2]
    return tail if following.startswith(tail) else ""


def _common_end(one: str, other: str) -> str:
    same = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(one), reversed(other)))
    return "".join(reversed([letter for letter, _ in same]))


def go_template(turns: Turns, bos: str | None) -> str:
    """The template in Go's text/template, as Ollama fills it in.

    Args:
        turns: from `read_turns`.
        bos: what the runner itself puts in front (the BOS token, where the tokenizer adds it), taken off here.
    """
    if bos and turns.user[0].startswith(bos):  # Llama 2: each question begins with one
        turns = _replace_bos(turns, bos)
    bare = lambda text: text.removeprefix(bos or "")  # noqa: E731
    lines = []
    if turns.system is None or turns.in_user:
        lines.append(_literal(bare(turns.begin)))
    else:
        before, after = turns.system
        begin = _literal(bare(turns.begin))
        lines.append("{{- if .System }}" + _around(bare(before), ".System", after))
        lines += ["{{- else }}" + begin] if begin else []
        lines.append("{{- end }}")
    in_user = ""
    if turns.between or turns.in_user:
        lines.append("{{- $first := true }}")
    if turns.between:
        in_user += "{{ if not $first }}" + _literal(turns.between) + "{{ end }}"
    in_user += _literal(turns.user[0])
    if turns.in_user and turns.system is not None:
        in_user += "{{ if and $first $.System }}" + _around(turns.system[0], "$.System", turns.system[1])
        in_user += "{{ end }}"
    in_user += "{{ .Content }}" + _literal(turns.user[1])
    in_user += "{{ $first = false }}" if turns.between or turns.in_user else ""
    before, after = map(_literal, turns.assistant)
    lines += [
        "{{- range $i, $_ := .Messages }}",
        "{{- $last := eq (len (slice $.Messages $i)) 1 }}",
        '{{- if eq .Role "user" }}' + in_user,
        '{{- else if eq .Role "assistant" }}'
        + before
        + "{{ .Content }}"
        # a last message of the assistant's is a beginning that Ollama has the model go on with
        + ("{{ if not $last }}" + after + "{{ end }}" if after else ""),
        "{{- end }}",
        '{{- if and $last (ne .Role "assistant") }}' + _literal(turns.prompt) + "{{ end }}",
        "{{- end }}",
    ]
    return "\n".join(line for line in lines if line)


def _replace_bos(turns: Turns, bos: str) -> Turns:
    return Turns(
        bos + turns.begin,
        turns.system,
        turns.in_user,
        (turns.user[0].removeprefix(bos), turns.user[1]),
        turns.assistant,
        turns.prompt,
        between=bos,
    )


def _literal(text: str) -> str:
    """Text as a Go string, so that the white space at its ends and braces in it are safe."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""


def _around(before: str, variable: str, after: str) -> str:
    return _literal(before) + "{{ " + variable + " }}" + _literal(after)


def stop_words(turns: Turns | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts at which Ollama ends an answer: EOS, the special tokens around turns, or else the user's opening."""
    words = [tokenizer.eos_token] if tokenizer.eos_token else []
    if turns is not None:
        around = turns.assistant[1] + turns.user[0] + turns.user[1] + turns.prompt
        specials = {
            token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()
        }
        words += sorted((token for token in specials if token in around), key=around.index)
        opening = turns.user[0].strip()
        if opening and not any(token in opening for token in specials):
            words.append(opening)
    return list(dict.fromkeys(words))


def modelfile(
    tokenizer: PreTrainedTokenizerBase,
    gguf_name: str,
    *,
    others: Sequence[str] = (),
    system: str | None = None,
    generation: Mapping[str, Any] | None = None,
) -> str:
    """The text of a Modelfile that lies beside its .gguf.

    Args:
        tokenizer: the model's, with its chat template.
        gguf_name: name of the .gguf file in the same folder. others: further files there that FROM could name.
        system: system prompt for conversations that bring none.
        generation: generation_config.json; its sampling settings become the model's defaults.

    Raises:
        ValueError: the system prompt holds \"\"\", which a Modelfile cannot, or the chat template takes none.
    """
    lines = ["# Made by jaxtune: ollama create NAME -f Modelfile"]
    lines += [f"# or, in the next line: ./{', ./'.join(others)}"] if others else []
    lines += [f"FROM ./{gguf_name}", ""]
    turns = read_turns(tokenizer)
    if turns is not None:
        begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        lines += [
            'TEMPLATE """' + go_template(turns, tokenizer.bos_token if begins else None) + '"""',
            "",
        ]
    elif tokenizer.chat_template:
        lines += [
            "# The chat template does more than put text around each message, so there is no TEMPLATE here.",
            "# Write one in Go's text/template if Ollama does not know this model's:",
            "# https://docs.ollama.com/modelfile#template",
            "",
        ]
    lines += [f"PARAMETER stop {_quoted(word)}" for word in stop_words(turns, tokenizer)]
    for name, value in (generation or {}).items():
        if name in _PARAMETERS and isinstance(value, (int, float)):
            lines.append(f"PARAMETER {_PARAMETERS[name]} {value}")
    if system is not None:
        if '"""' in system:
            raise ValueError('the system prompt holds """, which ends a text in a Modelfile')
        if turns is not None and turns.system is None:
            raise ValueError("system: this chat template takes no system message; leave it out")
        lines += ["", f'SYSTEM """{system}"""']
    return "\n".join(lines).rstrip() + "\n"


def _quoted(word: str) -> str:
    return f'"""{word}"""' if '"' in word or "\n" in word else f'"{word}"'


def commands(files: Sequence[Path], modelfile_path: Path | None) -> list[str]:
    """The command lines that run exported files: Ollama's, then llama.cpp's for the first file."""
    lines = []
    if modelfile_path is not None:
        name = files[0].name.rsplit(".", 2)[0].lower()
        lines += [f"ollama create {name} -f {_shell(modelfile_path)}", f"ollama run {name}"]
    return [*lines, f"llama-cli -m {_shell(files[0])}", f"llama-server -m {_shell(files[0])}"]


def _shell(path: Path) -> str:
    text = str(path)
    return f"'{text}'" if " " in text else text
