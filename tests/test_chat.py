"""`python -m jaxtune.chat` with a scripted standard input."""

import io

import pytest

from jaxtune import chat
from jaxtune.fast import FastLanguageModel
from jaxtune.generate import Engine


@pytest.fixture(scope="module")
def folder(tiny_model_dir, tmp_path_factory):
    """What a training run leaves: an adapter in an output folder."""
    model, _ = FastLanguageModel.from_pretrained(
        tiny_model_dir("llama"), dtype="float32", max_seq_length=None
    )
    run = tmp_path_factory.mktemp("run")
    adapted = FastLanguageModel.get_peft_model(model, r=4, init_lora_weights=False)
    adapted.save_pretrained(run / "adapter")
    (run / "train.yaml").write_text("learning_rate: 1e-3\n")
    return run


def talk(monkeypatch, capsys, folder, lines: str, *options: str):
    """Runs the program; returns what it printed and the prompts that its engine got, as text."""
    asked = []
    generate = Engine.generate

    def listening(self, prompts, **arguments):
        asked.append(self.model.tokenizer.decode(prompts[0]))
        return generate(self, prompts, **arguments)

    monkeypatch.setattr(Engine, "generate", listening)
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert chat.main([str(folder), "--max_new_tokens", "6", *options]) == 0
    return capsys.readouterr().out, asked


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def test_a_conversation(monkeypatch, capsys, folder):
    lines = 'Hi\nmore\\\nlines\n"""\na\n\nb\n"""\n/reset\nagain\n/system Be short.\nlast\n/what\n/help\n/exit\nnever\n'
    out, asked = talk(monkeypatch, capsys, folder, lines, "--temperature", "0")
    assert len(asked) == 5
    assert asked[0] == turn("user", "Hi") + "<|im_start|>assistant\n"
    assert asked[1].startswith(turn("user", "Hi") + "<|im_start|>assistant\n")
    assert asked[1].endswith(turn("user", "more\nlines") + "<|im_start|>assistant\n")
    assert asked[2].endswith(turn("user", "a\n\nb") + "<|im_start|>assistant\n")
    assert asked[3] == turn("user", "again") + "<|im_start|>assistant\n"
    assert asked[4] == turn("system", "Be short.") + turn("user", "last") + "<|im_start|>assistant\n"
    assert "there is no /what" in out and out.count("/reset ") == 3


def test_an_answer_is_printed_and_remembered(monkeypatch, capsys, folder):
    out, asked = talk(monkeypatch, capsys, folder, "Hi\nYes\n", "--seed", "3")
    first = asked[1].split("<|im_start|>assistant\n")[1].removesuffix(f"<|im_end|>\n{turn('user', 'Yes')}")
    assert first and f"> {first}\n" in out
    again, _ = talk(monkeypatch, capsys, folder, "Hi\nYes\n", "--seed", "3")
    other, _ = talk(monkeypatch, capsys, folder, "Hi\nYes\n", "--seed", "4")
    assert again == out != other


def test_ctrl_c_stops_the_answer_and_not_the_program(monkeypatch, capsys, folder):
    def interrupted(self, prompts, *, on_tokens, **_):
        on_tokens([(0, self.model.tokenizer("half")["input_ids"])])
        raise KeyboardInterrupt

    model, _ = FastLanguageModel.from_pretrained(folder / "adapter", dtype="float32", max_seq_length=None)
    settings, written = chat.Chat(str(folder)), []
    conversation = chat.Conversation(model, chat._sampling(model, settings), settings, written.append)
    monkeypatch.setattr(Engine, "generate", interrupted)
    assert conversation.answer("Hi") == "half" and "".join(written) == "half\n"
    assert conversation.turns[-1] == {"role": "assistant", "content": "half"}
    with pytest.raises(ValueError, match="max_seq_length is 256: /reset"):
        conversation.answer("long" * 100)

    lines = iter([KeyboardInterrupt, "/exit"])
    monkeypatch.setattr(chat, "_read", lambda: next(_raised(lines)))
    chat._talk(conversation)
    assert "/exit or Ctrl-D" in capsys.readouterr().out


def _raised(lines):
    for line in lines:
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        yield line


def test_what_cannot_be_used_is_said_in_one_line(capsys, folder, tmp_path):
    assert chat.main([str(tmp_path / "nothing")]) == 2
    assert chat.main([str(folder), "--top_p", "2"]) == 2
    error = capsys.readouterr().err
    assert "top_p must be in (0, 1], got 2.0" in error
