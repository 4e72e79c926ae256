"""Formats that TRL does not know, formatting functions of both habits, and what is refused."""

import copy

import pytest

from jaxtune.data import get_chat_template, prepare_dataset
from jaxtune.data.formats import alpaca_row, detect_format, formatting_is_batched

ALPACA = [
    {"instruction": "Add two numbers.", "input": "12 + 30", "output": "42"},
    {"instruction": "Say hello.", "input": "", "output": "Hello there"},
]
SHAREGPT = [
    {
        "conversations": [
            {"from": "system", "value": "S"},
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Ho"},
        ]
    }
]
MESSAGES = [
    {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Ho"},
        ]
    }
]


def prepared(rows, tokenizer, arguments, formatting_func=None, **changes):
    return prepare_dataset(rows, tokenizer, arguments(**changes), formatting_func)


def text_of(tokenizer, row):
    return tokenizer.decode(row["input_ids"])


def trained_text(tokenizer, row):
    return tokenizer.decode([label for label in row["labels"] if label != -100])


@pytest.fixture
def chatml(byte_level):
    return get_chat_template(byte_level, "chatml")


def test_sharegpt_roles_become_the_templates(chatml, arguments):
    expected = prepared(MESSAGES, chatml, arguments)[:]
    assert prepared(SHAREGPT, chatml, arguments)[:] == expected
    renamed = [{"conversations": MESSAGES[0]["messages"]}]
    assert prepared(renamed, chatml, arguments)[:] == expected


def test_alpaca_with_a_chat_template(chatml, arguments):
    first, second = prepared(ALPACA, chatml, arguments)
    assert text_of(chatml, first) == (
        "<|im_start|>user\nAdd two numbers.\n\n12 + 30<|im_end|>\n<|im_start|>assistant\n42<|im_end|>\n"
    )
    assert trained_text(chatml, first) == "42<|im_end|>\n"
    assert "Say hello.<|im_end|>" in text_of(chatml, second)
    everything = prepared(ALPACA, chatml, arguments, completion_only_loss=False)
    assert trained_text(chatml, everything[0]) == text_of(chatml, first)
    by_turn = prepared(ALPACA, chatml, arguments, completion_only_loss=False, assistant_only_loss=True)
    assert trained_text(chatml, by_turn[0]) == "42<|im_end|>\n"


def test_alpaca_without_a_chat_template(byte_level, arguments):
    first, second = prepared(ALPACA, byte_level, arguments)
    assert text_of(byte_level, first) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd two numbers.\n\n### Input:\n12 + 30\n\n### Response:\n42<|im_end|>"
    )
    assert trained_text(byte_level, first) == "42<|im_end|>"
    assert "### Input" not in text_of(byte_level, second)


def test_alpaca_system_column():
    row = ALPACA[1] | {"system": "Be brief."}
    _, chat = alpaca_row(row, chat=True)
    assert chat["prompt"][0] == {"role": "system", "content": "Be brief."}
    _, plain = alpaca_row(row, chat=False)
    assert plain["prompt"].startswith("Be brief.\n\n### Instruction:")


def test_order_of_formats():
    assert detect_format(MESSAGES[0] | {"text": "all of it"}) == "messages"  # as TRL
    assert detect_format({"conversations": MESSAGES[0]["messages"], "text": "all of it"}) == "text"  # as TRL
    assert detect_format(SHAREGPT[0] | {"text": "all of it"}) == "text"
    assert detect_format(ALPACA[0] | {"text": "all of it"}) == "text"
    assert detect_format(MESSAGES[0] | {"prompt": "first words", "prompt_id": "3"}) == "messages"
    assert detect_format({"body": "x"}, text_field="body") == "text"


@pytest.mark.parametrize(
    "row",
    [{"question": "a", "answer": "b"}, {"text": 3}, {"messages": []}, {"messages": "hi"}, {"prompt": "only"}],
)
def test_unknown_columns_are_listed(row):
    with pytest.raises(ValueError) as caught:
        detect_format(row)
    for said in (*row, "Known formats", "conversations", "instruction", "formatting_func"):
        assert said in str(caught.value)


def test_half_conversational_pair_is_refused():
    with pytest.raises(ValueError, match="came list and str"):
        detect_format({"prompt": MESSAGES[0]["messages"], "completion": "Ho"})


def single(row):
    return f"Q: {row['instruction'].strip()} A: {row['output']}"


def single_in_a_list(row):
    return [single(row)]


def single_in_a_dict(row):
    return {"text": single(row)}


def batched(rows):
    return [f"Q: {q.strip()} A: {a}" for q, a in zip(rows["instruction"], rows["output"], strict=False)]


def batched_in_a_dict(rows):
    return {"text": batched(rows)}


def batched_over_rows(rows):
    texts = []
    for place in range(len(rows["instruction"])):
        texts.append(f"Q: {rows['instruction'][place].strip()} A: {rows['output'][place]}")
    return texts


def test_formatting_habits_agree(byte_level, arguments):
    rows = ALPACA * 3
    expected = prepared([{"text": single(row)} for row in rows], byte_level, arguments)[:]
    singles, batches = (
        [single, single_in_a_list, single_in_a_dict],
        [batched, batched_in_a_dict, batched_over_rows],
    )
    for function in singles + batches:
        assert formatting_is_batched(function, rows[0]) == (function in batches), function
        assert prepared(rows, byte_level, arguments, function)[:] == expected, function


def test_batched_formatting_with_a_chat_template(chatml, arguments):
    """The notebooks' own: a list comprehension over the conversations of a batch."""

    def formatting(examples):
        convos = examples["messages"]
        return {"text": [chatml.apply_chat_template(convo, tokenize=False) for convo in convos]}

    assert formatting_is_batched(formatting, MESSAGES[0])
    row = prepared(MESSAGES, chatml, arguments, formatting)[0]
    assert text_of(chatml, row).startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi")


def test_one_row_may_become_several(byte_level, arguments):
    def both(row):
        return [row["instruction"], row["output"]]

    rows = prepared(ALPACA, byte_level, arguments, both)
    assert [text_of(byte_level, row) for row in rows] == [
        f"{row[column]}<|im_end|>" for row in ALPACA for column in ("instruction", "output")
    ]


def test_three_texts_of_one_row_are_no_batch():
    assert not formatting_is_batched(lambda row: [f"{n}: {row['instruction']}" for n in range(3)], ALPACA[0])


def test_useless_formatting_is_refused(byte_level, arguments):
    with pytest.raises(ValueError, match="for a row it gave int, for a batch int"):
        prepared(ALPACA, byte_level, arguments, lambda row: 3)
    with pytest.raises(ValueError, match="KeyError: 'answer'"):
        prepared(ALPACA, byte_level, arguments, lambda row: row["answer"])
    with pytest.raises(ValueError, match="exclude each other"):
        prepared(ALPACA, byte_level, arguments, single, completion_only_loss=True)


def test_bos_in_the_text_is_not_doubled(byte_level_bos, arguments):
    bos = byte_level_bos.bos_token_id
    rows = [{"text": "<|begin_of_text|>Say hello."}, {"text": "Say hello."}]
    marked, plain = prepared(rows, byte_level_bos, arguments)
    assert marked == plain
    assert marked["input_ids"][:2].count(bos) == 1
    twice = [{"text": "<|begin_of_text|><|begin_of_text|>Say"}]
    assert prepared(twice, byte_level_bos, arguments)[0]["input_ids"][:3].count(bos) == 2


def test_no_eos_token(byte_level, arguments):
    tokenizer = copy.deepcopy(byte_level)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        prepared([{"text": "a"}], tokenizer, arguments)
    with pytest.raises(ValueError, match=r"'<\|nothing\|>' is not in the tokenizer's vocabulary"):
        prepared([{"text": "a"}], byte_level, arguments, eos_token="<|nothing|>")


def test_missing_text_is_named(byte_level, arguments):
    with pytest.raises(ValueError, match="a row has None"):
        prepared([{"text": "a"}, {"text": None}], byte_level, arguments)


def test_conversations_need_a_template(byte_level, arguments):
    with pytest.raises(ValueError, match=r"no chat template.*get_chat_template"):
        prepared(MESSAGES, byte_level, arguments)


def test_a_refusing_template_names_the_row(byte_level, arguments):
    tokenizer = get_chat_template(byte_level, "gemma")
    rows = [MESSAGES[0], {"messages": [{"role": "assistant", "content": "I begin"}]}]
    for assistant_only in (False, True):
        with pytest.raises(ValueError, match=r"cannot render a conversation .*must alternate.*I begin"):
            prepared(rows, tokenizer, arguments, assistant_only_loss=assistant_only)
