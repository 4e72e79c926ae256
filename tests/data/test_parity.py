"""Ids, labels and packing against TRL's SFTTrainer, on every format it knows."""

import copy
import json

import datasets
import numpy as np
import pytest

from jaxtune.data import Batches, pack, preparation_report, prepare_dataset

TEXT = [
    {"text": "What is the capital of France?\n\nThe capital of France is Paris.\n"},
    {"text": "Add two numbers:  12 + 30 = 42.<|im_end|>"},
    {"text": "Say hello. \u00dcnic\u00f6de \U0001f600 \u4e2d\u6587"},
]
PLAIN_PAIRS = [
    {"prompt": "The capital of France is", "completion": " Paris."},
    {"prompt": "Add two numbers: 12 + 30 =", "completion": "42. Explain"},
    {"prompt": "Say hello.\n", "completion": "\n\nHello there"},
    {"prompt": "ends", "completion": "here<|im_end|>"},
]
MESSAGES = [
    {
        "messages": [
            {"role": "user", "content": "What is the capital of France?"},
            {"role": "assistant", "content": "\n\nThe capital of France is Paris."},
            {"role": "user", "content": "And 12 + 30?"},
            {"role": "assistant", "content": "<think>\nFirst add the tens.\n</think>\n\n42."},
        ]
    },
    {
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": " Say hello. "},
            {"role": "assistant", "content": "Hello there, how are you today? "},
        ]
    },
]
NO_SYSTEM = [{"messages": row["messages"][-2:]} for row in MESSAGES] + [MESSAGES[0]]
CHAT_PAIRS = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in MESSAGES]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
TOOL_MESSAGES = [
    {"role": "user", "content": "What is the weather of Paris?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "21 degrees"},
    {"role": "assistant", "content": "The temperature of Paris is 21 degrees."},
]
TOOLS = [
    {"messages": TOOL_MESSAGES, "tools": [TOOL]},
    {
        "messages": [{"role": "system", "content": "You are a helpful assistant."}, *TOOL_MESSAGES],
        "tools": [TOOL],
    },
]
TOKENISED = [
    {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]},
    {"input_ids": [9, 4], "completion_mask": [0, 1]},
]


def with_template(tokenizer, templates, name):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (templates / f"{name}.jinja").read_text()
    return tokenizer


def assert_equal(ours: datasets.Dataset, trainer) -> None:
    theirs = trainer.train_dataset
    assert ours["input_ids"][:] == theirs["input_ids"][:]
    assert ours["labels"][:] == theirs["labels"][:]
    collated = trainer.data_collator([theirs[row] for row in range(len(theirs))])
    for row, labels in enumerate(ours["labels"]):
        assert collated["labels"][row, : len(labels)].tolist() == labels


@pytest.mark.parametrize("tokenizer", ["byte_level", "byte_level_bos", "sentencepiece_like"])
@pytest.mark.parametrize("rows", [TEXT, PLAIN_PAIRS], ids=["text", "pairs"])
@pytest.mark.parametrize("completion_only", [None, True, False])
def test_plain(rows, tokenizer, completion_only, request, arguments, trl_trainer):
    tokenizer = request.getfixturevalue(tokenizer)
    trainer = trl_trainer(rows, tokenizer, completion_only_loss=completion_only)
    assert_equal(prepare_dataset(rows, tokenizer, arguments(completion_only_loss=completion_only)), trainer)


@pytest.mark.parametrize(
    "template", ["qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3", "llama3_1", "phi3"]
)
@pytest.mark.parametrize("rows", [MESSAGES, CHAT_PAIRS], ids=["messages", "pairs"])
@pytest.mark.parametrize("completion_only", [None, False])
def test_conversations(rows, template, completion_only, byte_level, arguments, trl_templates, trl_trainer):
    tokenizer = with_template(byte_level, trl_templates, template)
    trainer = trl_trainer(rows, tokenizer, completion_only_loss=completion_only)
    assert_equal(prepare_dataset(rows, tokenizer, arguments(completion_only_loss=completion_only)), trainer)


@pytest.mark.parametrize("rows", [MESSAGES, CHAT_PAIRS], ids=["messages", "pairs"])
def test_template_brings_the_only_bos(rows, byte_level_bos, arguments, trl_templates, trl_trainer):
    tokenizer = with_template(byte_level_bos, trl_templates, "llama3")
    ours = prepare_dataset(rows, tokenizer, arguments())
    assert_equal(ours, trl_trainer(rows, tokenizer))
    assert {ids.count(tokenizer.bos_token_id) for ids in ours["input_ids"]} == {1}


@pytest.mark.parametrize(
    "template", ["qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3", "gemma", "gemma3", "phi3", "phi3_5"]
)
@pytest.mark.parametrize("pairs", [False, True], ids=["messages", "pairs"])
def test_assistant_only(template, pairs, byte_level, arguments, trl_templates, trl_trainer):
    tokenizer = with_template(byte_level, trl_templates, template)
    rows = NO_SYSTEM if template == "gemma" else MESSAGES
    if pairs:
        rows = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    trainer = trl_trainer(rows, tokenizer, assistant_only_loss=True)
    assert_equal(prepare_dataset(rows, tokenizer, arguments(assistant_only_loss=True)), trainer)


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "qwen3_instruct_2507"])
@pytest.mark.parametrize("assistant_only", [False, True])
@pytest.mark.parametrize("as_json", [False, True])
def test_tools(template, assistant_only, as_json, byte_level, arguments, trl_templates, trl_trainer):
    tokenizer = with_template(byte_level, trl_templates, template)
    rows = [row | {"tools": json.dumps(row["tools"])} if as_json else row for row in TOOLS]
    trainer = trl_trainer(rows, tokenizer, assistant_only_loss=assistant_only)
    ours = prepare_dataset(rows, tokenizer, arguments(assistant_only_loss=assistant_only))
    assert_equal(ours, trainer)
    assert '"name": "weather", "description"' in tokenizer.decode(ours[0]["input_ids"])


def test_template_kwargs(byte_level, arguments, trl_templates, trl_trainer):
    tokenizer = with_template(byte_level, trl_templates, "qwen3")
    rows = [row | {"chat_template_kwargs": {"enable_thinking": False}} for row in CHAT_PAIRS]
    trainer = trl_trainer(rows, tokenizer)
    assert_equal(prepare_dataset(rows, tokenizer, arguments()), trainer)


def test_sharegpt_with_template_roles(byte_level, arguments, trl_templates, trl_trainer):
    tokenizer = with_template(byte_level, trl_templates, "qwen2_5")
    rows = [
        {"conversations": [{"from": turn["role"], "value": turn["content"]} for turn in row["messages"]]}
        for row in MESSAGES
    ]
    assert_equal(prepare_dataset(rows, tokenizer, arguments()), trl_trainer(rows, tokenizer))


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_text_beside_conversations(column, byte_level, arguments, trl_templates, trl_trainer):
    tokenizer = with_template(byte_level, trl_templates, "qwen2_5")
    rows = [
        {column: row["messages"], "text": "rendered: " + row["messages"][-1]["content"]} for row in MESSAGES
    ]
    ours = prepare_dataset(rows, tokenizer, arguments())
    assert_equal(ours, trl_trainer(rows, tokenizer))
    assert tokenizer.decode(ours[0]["input_ids"]).startswith("rendered") == (column == "conversations")


@pytest.mark.parametrize("completion_only", [None, True])
def test_tokenised(completion_only, byte_level, arguments, trl_trainer):
    trainer = trl_trainer(TOKENISED, byte_level, completion_only_loss=completion_only)
    assert_equal(
        prepare_dataset(TOKENISED, byte_level, arguments(completion_only_loss=completion_only)), trainer
    )
    labelled = [{"input_ids": [5, 6, 7], "labels": [-100, 9, 7]}]
    assert_equal(prepare_dataset(labelled, byte_level, arguments()), trl_trainer(labelled, byte_level))


def test_formatting_func(byte_level, arguments, trl_trainer):
    rows = [
        {"question": "What is 12 + 30?", "answer": "42"},
        {"question": "Say hello.", "answer": "Hello there"},
    ]

    def formatting(row):
        return f"### Instruction:\n{row['question']}\n\n### Response:\n{row['answer']}"

    trainer = trl_trainer(rows, byte_level, formatting_func=formatting)
    assert_equal(prepare_dataset(rows, byte_level, arguments(), formatting), trainer)


@pytest.mark.parametrize("max_length", [1, 4, 7, None])
def test_truncation(max_length, byte_level, arguments, trl_trainer):
    trainer = trl_trainer(PLAIN_PAIRS, byte_level, max_length=max_length, completion_only_loss=False)
    ours = prepare_dataset(
        PLAIN_PAIRS, byte_level, arguments(max_length=max_length, completion_only_loss=False)
    )
    assert_equal(ours, trainer)


def test_truncation_drops_masked_rows(byte_level, arguments, trl_trainer):
    rows = [{"prompt": "a b c d e f " * repeats, "completion": "42"} for repeats in (1, 9, 2)]
    trainer = trl_trainer(rows, byte_level, max_length=30)
    ours = prepare_dataset(rows, byte_level, arguments(max_length=30))
    assert_equal(ours, trainer)
    report = preparation_report(ours)
    assert (report.rows_in, report.rows, report.dropped) == (3, 2, 1)


@pytest.mark.parametrize("eos_token", ["<|eot_id|>", "<|im_end|>"])
def test_eos_token(eos_token, byte_level, arguments, trl_trainer):
    trainer = trl_trainer(TEXT, byte_level, eos_token=eos_token)
    ours = prepare_dataset(TEXT, byte_level, arguments(eos_token=eos_token))
    assert_equal(ours, trainer)
    assert byte_level.eos_token == eos_token


def test_shuffle_dataset(byte_level, arguments, trl_trainer):
    rows = [{"text": f"number {n}"} for n in range(40)]
    trainer = trl_trainer(rows, byte_level, shuffle_dataset=True, seed=7)
    assert_equal(prepare_dataset(rows, byte_level, arguments(shuffle_dataset=True, seed=7)), trainer)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
@pytest.mark.parametrize("rows", [40, 1345])
def test_packing(strategy, rows, byte_level, arguments, trl_trainer):
    lengths = np.random.default_rng(rows).integers(1, 60, rows)
    data = [{"prompt": "1 " * 3, "completion": "2 " * int(length)} for length in lengths]
    trainer = trl_trainer(data, byte_level, packing=True, packing_strategy=strategy, max_length=32)
    ours = prepare_dataset(
        data, byte_level, arguments(packing=True, packing_strategy=strategy, max_length=32)
    )
    packed = pack(ours, 32, strategy)
    theirs = trainer.train_dataset
    assert packed["input_ids"][:] == theirs["input_ids"][:]
    assert packed["labels"][:] == theirs["labels"][:]
    if strategy != "wrapped":
        assert packed["seq_lengths"][:] == theirs["seq_lengths"][:]


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_packed_batches_equal_the_padding_free_collator(strategy, byte_level, arguments, trl_trainer):
    data = [{"text": "1 2 " * length} for length in (3, 9, 2, 20, 5, 7)]
    trainer = trl_trainer(data, byte_level, packing=True, packing_strategy=strategy, max_length=32)
    ours = prepare_dataset(
        data, byte_level, arguments(packing=True, packing_strategy=strategy, max_length=32)
    )
    packed = pack(ours, 32, strategy)
    batch = next(Batches(packed, batch_size=len(packed), max_length=32, packed=True).eval_batches())
    theirs = trainer.data_collator([trainer.train_dataset[row] for row in range(len(packed))])
    real = batch["segment_ids"] > 0
    for name, name_there in (("input_ids", "input_ids"), ("labels", "labels"), ("positions", "position_ids")):
        np.testing.assert_array_equal(batch[name][real], theirs[name_there][0].numpy(), err_msg=name)
    np.testing.assert_array_equal(
        np.flatnonzero(batch["positions"][real] == 0), theirs["cu_seq_lens_q"][:-1].numpy()
    )


def test_smollm2(smollm2, arguments, trl_trainer):
    for rows in (TEXT, PLAIN_PAIRS, MESSAGES, CHAT_PAIRS):
        assert_equal(prepare_dataset(rows, smollm2, arguments()), trl_trainer(rows, smollm2))
