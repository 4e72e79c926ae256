"""Chat templates: what they render, against the field's own templates and against written-out conversations."""

import copy

import jinja2
import pytest

from jaxtune.data import CHAT_TEMPLATES, get_chat_template
from jaxtune.data.templates import ALIASES, FIELD_TEMPLATES, has_marks, marked_variant
from jaxtune.data.tokenise import ChatEncoder

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
TALK = [(USER, "Hi."), (ASSISTANT, "Hello!"), (USER, "2+2?"), (ASSISTANT, "4")]
OWN_TO_FIELD = {
    "llama-3": ["llama3"],
    "llama-3.1": ["llama3_1"],
    "qwen-2.5": ["qwen2_5"],
    "qwen-3": ["qwen3"],
    "qwen3-instruct": ["qwen3_instruct_2507"],
    "gemma": ["gemma"],
    "gemma-3": ["gemma3"],
    "phi-3": ["phi3", "phi3_5"],
}
PAIRS = [(own, field) for own, fields in OWN_TO_FIELD.items() for field in fields]

# What models were trained on, written out.
RENDERED = {
    "chatml": "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n",
    "mistral": "<s>[INST] Hi. [/INST]Hello!</s>[INST] 2+2? [/INST]4</s>",
    "llama": "<s>[INST] Hi. [/INST] Hello! </s><s>[INST] 2+2? [/INST] 4 </s>",
    "phi-4": "<|im_start|>user<|im_sep|>Hi.<|im_end|><|im_start|>assistant<|im_sep|>Hello!<|im_end|>"
    "<|im_start|>user<|im_sep|>2+2?<|im_end|><|im_start|>assistant<|im_sep|>4<|im_end|>",
    "zephyr": "<|user|>\nHi.</s>\n<|assistant|>\nHello!</s>\n<|user|>\n2+2?</s>\n<|assistant|>\n4</s>\n",
    "vicuna": "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. "
    "USER: Hi. ASSISTANT: Hello!</s>USER: 2+2? ASSISTANT: 4</s>",
    "alpaca": "<s>Below are some instructions that describe some tasks. Write responses that appropriately complete "
    "each request.\n\n### Instruction:\nHi.\n\n### Response:\nHello!</s>\n\n"
    "### Instruction:\n2+2?\n\n### Response:\n4</s>\n\n",
    "unsloth": "<s>You are a helpful assistant to the user\n>>> User: Hi.\n>>> Assistant: Hello!</s>\n"
    ">>> User: 2+2?\n>>> Assistant: 4</s>\n",
}
GENERATION_PROMPT = {
    "chatml": "<|im_start|>assistant\n",
    "alpaca": "### Response:\n",
    "vicuna": "ASSISTANT: ",
}


def conversation(talk=TALK):
    return [{"role": role, "content": content} for role, content in talk]


def conversations():
    system = (SYSTEM, "Be brief.")
    yield conversation()
    yield conversation(TALK[:1])
    yield conversation([system, *TALK])
    yield conversation([(USER, " padded \n"), (ASSISTANT, "\n<think>\nhm\n</think>\n\nyes "), (USER, "ok")])


def render(tokenizer, messages, **options):
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except jinja2.TemplateError as error:
        return type(error)


@pytest.mark.parametrize("own,field", PAIRS)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_renders_as_the_field(own, field, add_generation_prompt, byte_level, trl_templates):
    theirs = copy.deepcopy(byte_level)
    theirs.chat_template = (trl_templates / f"{field}.jinja").read_text()
    ours = get_chat_template(byte_level, own, map_eos_token=False)
    for messages in conversations():
        if own == "gemma" and messages[0]["role"] == SYSTEM:
            continue  # the field's refuses a system message, this one puts it into the first user message
        options = {"add_generation_prompt": add_generation_prompt}
        assert render(ours, messages, **options) == render(theirs, messages, **options)


@pytest.mark.parametrize("own,field", PAIRS)
def test_shared_copies_render_alike(own, field, byte_level, shared_data):
    theirs = copy.deepcopy(byte_level)
    path = shared_data / "tokenizers" / "chat_templates_trl" / f"{field}.jinja"
    theirs.chat_template = path.read_text()
    ours = get_chat_template(byte_level, own, map_eos_token=False)
    assert render(ours, conversation()) == render(theirs, conversation())


@pytest.mark.parametrize("own", ["llama-3.1", "qwen-2.5", "qwen-3", "qwen3-instruct"])
@pytest.mark.parametrize("system", [False, True])
def test_tools_render_as_the_field(own, system, byte_level, trl_templates):
    function = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "é"}}}
    messages = [
        *([{"role": SYSTEM, "content": "Be brief."}] if system else []),
        {"role": USER, "content": "2+2?"},
        {"role": ASSISTANT, "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        {"role": ASSISTANT, "content": "It is 4."},
        {"role": USER, "content": "And 3?"},
        {"role": ASSISTANT, "content": "Wait.", "tool_calls": [call]},
        {"role": "tool", "content": "5"},
        {"role": "tool", "content": "again 5"},
    ]
    theirs = copy.deepcopy(byte_level)
    theirs.chat_template = (trl_templates / f"{OWN_TO_FIELD[own][0]}.jinja").read_text()
    ours = get_chat_template(byte_level, own)
    tools = [{"type": "function", "function": function}]
    for length in range(1 + system, len(messages) + 1):
        options = {"tools": tools, "add_generation_prompt": True}
        assert render(ours, messages[:length], **options) == render(theirs, messages[:length], **options)


@pytest.mark.parametrize("name", RENDERED)
def test_renders_as_written(name, sentencepiece_like):
    tokenizer = get_chat_template(sentencepiece_like, name, map_eos_token=False)
    assert render(tokenizer, conversation()) == RENDERED[name]
    if name in GENERATION_PROMPT:
        asked = render(tokenizer, conversation(TALK[:3]), add_generation_prompt=True)
        assert asked.endswith(GENERATION_PROMPT[name])
        assert RENDERED[name].startswith(asked)


# The others take strings only, as the models' own templates do.
@pytest.mark.parametrize(
    "name", sorted(set(CHAT_TEMPLATES) - {"llama-3.1", "qwen-2.5", "qwen-3", "qwen3-instruct"})
)
def test_structured_text_renders_as_strings(name, byte_level):
    tokenizer = get_chat_template(byte_level, name)
    blocks = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in conversation()]
    assert render(tokenizer, blocks) == render(tokenizer, conversation())


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_saved_template_has_no_marks_and_is_recognised(name, byte_level):
    tokenizer = get_chat_template(byte_level, name, system_message="Be brief.")
    assert not has_marks(tokenizer.chat_template)
    marked = marked_variant(tokenizer.chat_template)
    assert has_marks(marked)
    plain = render(tokenizer, conversation())
    if name != "qwen-3":  # trains with a <think> block in every turn
        assert render(tokenizer, conversation(), chat_template=marked) == plain
    assert "Be brief." in plain


@pytest.mark.parametrize("name", sorted(set(CHAT_TEMPLATES) - {"qwen-3", "qwen-2.5"}))
def test_marks_agree_with_spans_found_by_prefix(name, byte_level):
    """Two ways to the assistant's tokens: the template's marks, and what each answer adds to its prompt."""
    tokenizer = get_chat_template(byte_level, name)
    row = {"messages": conversation(), "tools": None, "chat_template_kwargs": {}}
    by_marks = ChatEncoder(tokenizer, assistant_only=True)
    by_prefix = ChatEncoder(tokenizer, assistant_only=True)
    assert by_marks.template is not None
    by_prefix.template = None
    marks, prefix = by_marks.encode([row])[0], by_prefix.encode([row])[0]
    assert marks.ids.tolist() == prefix.ids.tolist()
    assert marks.assistant.tolist() == prefix.assistant.tolist()
    assert 0 < marks.assistant.sum() < len(marks.ids)


@pytest.mark.parametrize("own,field", PAIRS)
def test_named_and_field_templates_train_alike(own, field, byte_level, trl_templates):
    theirs = copy.deepcopy(byte_level)
    theirs.chat_template = (trl_templates / f"{field}.jinja").read_text()
    ours = get_chat_template(byte_level, own, map_eos_token=False)
    row = {"messages": conversation(), "tools": None, "chat_template_kwargs": {}}
    encoded = [ChatEncoder(tokenizer, assistant_only=True).encode([row])[0] for tokenizer in (ours, theirs)]
    assert encoded[0].ids.tolist() == encoded[1].ids.tolist()
    assert encoded[0].assistant.tolist() == encoded[1].assistant.tolist()


def test_field_digests(byte_level, trl_templates):
    """Every known digest belongs to a template of the field, and none of them is stored here."""
    import hashlib

    texts = [path.read_text() for path in trl_templates.glob("*.jinja")]
    assert FIELD_TEMPLATES.keys() <= {hashlib.sha256(text.encode()).hexdigest() for text in texts}
    assert not {template.plain for template in CHAT_TEMPLATES.values()} & set(texts)


@pytest.mark.parametrize("name", [*ALIASES, "ChatML", "LLAMA-3.1"])
def test_aliases(name, byte_level):
    key = ALIASES.get(name.lower(), name.lower())
    assert get_chat_template(byte_level, name).chat_template == CHAT_TEMPLATES[key].plain


def test_unknown_name_lists_the_known(byte_level):
    with pytest.raises(ValueError, match=r"no chat template 'chatmll'.*chatml.*llama-3\.1.*zephyr"):
        get_chat_template(byte_level, "chatmll")


def test_mapping(byte_level):
    mapping = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
    tokenizer = get_chat_template(byte_level, "chatml", mapping=mapping)
    names = {USER: "human", ASSISTANT: "gpt"}
    sharegpt = [{"from": names[turn["role"]], "value": turn["content"]} for turn in conversation()]
    assert render(tokenizer, sharegpt) == RENDERED["chatml"]
    row = {"messages": sharegpt, "tools": None, "chat_template_kwargs": {}}
    mask = ChatEncoder(tokenizer, assistant_only=True).encode([row])[0].assistant
    assert 0 < mask.sum() < len(mask)
    with pytest.raises(ValueError, match="asistant"):
        get_chat_template(byte_level, "chatml", mapping={"asistant": "gpt"})


def test_stop_word_becomes_eos(byte_level):
    assert get_chat_template(byte_level, "llama-3").eos_token == "<|eot_id|>"
    assert get_chat_template(byte_level, "chatml", map_eos_token=False).eos_token == "<|eot_id|>"


def test_missing_stop_word_renames_the_eos_token(sentencepiece_like, tmp_path):
    eos = sentencepiece_like.eos_token_id
    before = sentencepiece_like("What is the capital?")["input_ids"]
    tokenizer = get_chat_template(sentencepiece_like, "chatml")
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", eos)
    assert len(tokenizer) == len(sentencepiece_like)
    assert tokenizer("What is the capital?")["input_ids"] == before
    assert tokenizer("Hello<|im_end|>")["input_ids"][-1] == eos
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again.eos_token_id == eos and again.chat_template == tokenizer.chat_template


def test_own_template(byte_level):
    source = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
    tokenizer = get_chat_template(byte_level, (source, "<|end|>"))
    assert render(tokenizer, conversation(TALK[:2])) == "user:Hi.<|end|>assistant:Hello!<|end|>"


def test_system_message_is_quoted(byte_level):
    text = 'It\'s "fine" \\ \n{{ 1 }}'
    tokenizer = get_chat_template(byte_level, "chatml", system_message=text)
    assert render(tokenizer, conversation(TALK[:1])).startswith(f"<|im_start|>system\n{text}<|im_end|>\n")
    own = conversation([(SYSTEM, "Mine."), *TALK])
    assert render(tokenizer, own).startswith("<|im_start|>system\nMine.<|im_end|>\n<|im_start|>user")


def test_unknown_role_is_refused(byte_level):
    tokenizer = get_chat_template(byte_level, "zephyr")
    with pytest.raises(jinja2.TemplateError, match="came tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)
