"""`python -m jaxtune.chat MODEL`: talk to a model or an adapter in the terminal.

Exit status: 0 left, 2 a setting or model that cannot be used (one line).
"""

import dataclasses
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from jaxtune.generate import Sampling
    from jaxtune.model import Model

COMMANDS = """  /reset         forget the conversation
  /system TEXT   set the system prompt (without TEXT: none) and forget the conversation
  /help          this
  /exit          leave; so does Ctrl-D
  Ctrl-C stops an answer. A line that ends in \\ goes on in the next; so do those between two lines of \"\"\"."""

DESCRIPTION = f"""Talk to a model in the terminal.

examples:
  python -m jaxtune.chat HuggingFaceTB/SmolLM2-135M-Instruct
  python -m jaxtune.chat outputs/orders --temperature 0

in the conversation:
{COMMANDS}"""


@dataclasses.dataclass(frozen=True)
class Chat:
    """One run of `python -m jaxtune.chat`."""

    model: tyro.conf.Positional[str]
    """Hugging Face folder or hub id, adapter folder, .gguf file, or output folder of jaxtune.train."""
    system: str | None = None
    """System prompt."""
    temperature: float | None = None
    """Logits are divided by it; 0 takes the most likely token. None = the model's own, or 0.7."""
    top_k: int | None = None
    """Choose among the k most likely tokens, 0 = all. None = the model's own, or all."""
    top_p: float | None = None
    """Choose among the most likely tokens that reach this probability together. None = the model's own, or all."""
    min_p: float | None = None
    """Choose among tokens at least this many times as likely as the most likely. None = the model's own, or all."""
    repetition_penalty: float | None = None
    """Makes tokens that were there less likely. None = the model's own, or 1."""
    max_new_tokens: int = 1024
    """Tokens of an answer at most."""
    seed: int = 0
    """Of the sampling; the same conversation gets the same answers."""
    max_seq_length: int | None = None
    """Tokens of the conversation at most. None = the model's own."""
    load_in_16bit: bool = False
    """Keep the weights in 16 bits (32 on a CPU) instead of NF4."""
    revision: str | None = None
    """Branch, tag or commit of the repository."""
    token: Annotated[str | None, tyro.conf.arg(metavar="TOKEN")] = dataclasses.field(default=None, repr=False)
    """Access token of the hub."""
    traceback: bool = False
    """Show where an error came from."""


class Conversation:
    """Turns so far, and what answers them.

    Args:
      model: with a tokenizer. sampling: how tokens are chosen. settings: the run's.
      write: where an answer's text goes as it comes.
    """

    def __init__(self, model: "Model", sampling: "Sampling", settings: Chat, write: Callable[[str], Any]):
        from jaxtune.generate import Engine

        self._model, self._sampling, self._settings, self._write = model, sampling, settings, write
        self._engine = Engine(model, progress=False)
        self._system = settings.system
        self._answers = 0
        self.reset()

    def reset(self, system: str | None = None) -> None:
        """Forgets all turns. system: a new system prompt, "" for none; None keeps the present one."""
        self._system = self._system if system is None else system
        self.turns = [{"role": "system", "content": self._system}] if self._system else []

    def answer(self, text: str) -> str:
        """The answer to one more turn of the user, written as it comes. Ctrl-C ends it; what was said counts.

        Raises:
          ValueError: the conversation has no room left for an answer.
        """
        from jaxtune.generate import TextStreamer

        turns = [*self.turns, {"role": "user", "content": text}]
        ids, said = self._ids(turns), []
        room = self._model.max_seq_length - len(ids)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(ids)} tokens, max_seq_length is {self._model.max_seq_length}: /reset"
            )
        streamer = TextStreamer(self._model.tokenizer, write=self._write, skip_special_tokens=True)

        def on_tokens(new):
            said.extend(new[0][1])
            streamer.put(new[0][1])

        try:
            self._engine.generate(
                [ids],
                sampling=self._sampling,
                max_new_tokens=min(self._settings.max_new_tokens, room),
                seed=(self._settings.seed + self._answers) % 2**32,
                on_tokens=on_tokens,
            )
        except KeyboardInterrupt:
            pass
        streamer.end()
        answer = self._model.tokenizer.decode(said, skip_special_tokens=True)
        self.turns = [*turns, {"role": "assistant", "content": answer}]
        self._answers += 1
        return answer

    def _ids(self, turns: list[dict[str, str]]) -> list[int]:
        tokenizer = self._model.tokenizer
        if tokenizer.chat_template:
            return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        return tokenizer("".join(turn["content"] for turn in turns))["input_ids"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a conversation on standard input and output; returns the exit status."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would say that there is no PyTorch
    settings = tyro.cli(
        Chat,
        prog="python -m jaxtune.chat",
        description=DESCRIPTION,
        args=None if arguments is None else list(arguments),
        use_underscores=True,
    )
    try:
        conversation = _begin(settings)
    except (ValueError, TypeError, OSError) as error:
        if settings.traceback:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    _talk(conversation)
    return 0


def _begin(settings: Chat) -> Conversation:
    # Only now: --help and a mistyped setting should not wait for jax and transformers.
    from jaxtune import hub
    from jaxtune.fast import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        hub.trained_in(settings.model),
        devices=1,
        max_seq_length=settings.max_seq_length,
        load_in_16bit=settings.load_in_16bit,
        revision=settings.revision,
        token=settings.token,
    )
    if settings.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {settings.max_new_tokens}")
    if not tokenizer.chat_template:
        print("the tokenizer has no chat template: the model goes on with the plain text", file=sys.stderr)
    return Conversation(
        model, _sampling(model, settings), settings, lambda text: print(text, end="", flush=True)
    )


def _sampling(model: "Model", settings: Chat) -> "Sampling":
    """The settings over the model's own over the defaults."""
    from jaxtune.generate import Sampling

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    own = {name: model.checkpoint.generation_config.get(name) for name in names}
    given = {name: getattr(settings, name) for name in names}
    known = [{name: value for name, value in part.items() if value is not None} for part in (own, given)]
    chosen: dict[str, Any] = {"temperature": 0.7} | known[0] | known[1]
    if chosen["temperature"] == 0:
        return Sampling(repetition_penalty=chosen.get("repetition_penalty", 1.0))
    return Sampling(do_sample=True, **chosen)


def _talk(conversation: Conversation) -> None:
    """Reads turns and commands until the input ends."""
    print(COMMANDS)
    while True:
        try:
            text = _read()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n/exit or Ctrl-D to leave")
            continue
        command, _, rest = text.partition(" ")
        if command == "/exit":
            return
        if command == "/help":
            print(COMMANDS)
        elif command in ("/reset", "/system"):
            conversation.reset(rest.strip() if command == "/system" else None)
            print("a new conversation")
        elif command.startswith("/") and command[1:].isalpha():
            print(f"there is no {command}\n{COMMANDS}")
        elif text.strip():
            try:
                conversation.answer(text)
            except ValueError as error:
                print(error)


def _read() -> str:
    """One turn: a line, lines that end in a backslash and the next, or the lines between two of three quotes."""
    line = input("> ")
    if line.strip() == '"""':
        lines = []
        while (line := input(". ")).strip() != '"""':
            lines.append(line)
        return "\n".join(lines)
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(". "))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
