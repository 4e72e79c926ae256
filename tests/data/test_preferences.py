"""Preference rows against TRL's DPOTrainer, and how they become batches."""

import copy
import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest

from jaxtune.data import PAIR_COLUMNS, Batches, pair_rows, prepare_preferences
from jaxtune.data.preferences import split_prompt

TEXTS = [
    {"prompt": "The capital of France is", "chosen": " Paris.", "rejected": " 12, I think."},
    {"prompt": "Add two numbers: 12 + 30 =", "chosen": "42<|im_end|>", "rejected": "\n\n43"},
    {"prompt": "Say hello.\n", "chosen": "\nHello there", "rejected": "\n\n"},
]
IMPLICIT = [
    {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in TEXTS
] + [{"chosen": "The same, but longer", "rejected": "The same"}]
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
ASKED = [SYSTEM, {"role": "user", "content": "What is the capital of France?"}]
CHATS = [
    {
        "prompt": ASKED,
        "chosen": [{"role": "assistant", "content": "Paris."}],
        "rejected": [{"role": "assistant", "content": "<think>\nhm\n</think>\n\n12."}],
    },
    {
        "prompt": [*ASKED, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "And?"}],
        "chosen": [{"role": "assistant", "content": "Hello there, how are you today?"}],
        "rejected": [{"role": "assistant", "content": ""}],
    },
]
IMPLICIT_CHATS = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in CHATS]
TOOL = {"type": "function", "function": {"name": "weather", "description": "?", "parameters": {}}}


@pytest.fixture
def trl_pairs():
    """TRL's own preparation, without its model."""
    from trl.trainer.dpo_trainer import DPOTrainer

    def prepare(rows, tokenizer, max_length=None):
        args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start")
        me = SimpleNamespace(_tokenizer=tokenizer)
        return DPOTrainer._prepare_dataset(me, datasets.Dataset.from_list(rows), tokenizer, args, "train")

    return prepare


def with_template(tokenizer, templates, name):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (templates / f"{name}.jinja").read_text()
    return tokenizer


def assert_equal(ours, theirs):
    assert ours.column_names == list(PAIR_COLUMNS)
    for name in PAIR_COLUMNS:
        assert ours[name][:] == theirs[name][:]


@pytest.mark.parametrize("tokenizer", ["byte_level", "byte_level_bos", "sentencepiece_like"])
@pytest.mark.parametrize("rows", [TEXTS, IMPLICIT], ids=["explicit", "implicit"])
def test_texts(rows, tokenizer, request, trl_pairs):
    tokenizer = request.getfixturevalue(tokenizer)
    assert_equal(prepare_preferences(rows, tokenizer), trl_pairs(rows, tokenizer))


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "llama3", "phi3"])
@pytest.mark.parametrize("rows", [CHATS, IMPLICIT_CHATS], ids=["explicit", "implicit"])
def test_chats(rows, template, byte_level, trl_templates, trl_pairs):
    tokenizer = with_template(byte_level, trl_templates, template)
    assert_equal(prepare_preferences(rows, tokenizer), trl_pairs(rows, tokenizer))


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_and_template_kwargs(as_json, byte_level, trl_templates, trl_pairs):
    tokenizer = with_template(byte_level, trl_templates, "qwen3")
    tools = json.dumps([TOOL]) if as_json else [TOOL]
    rows = [row | {"tools": tools, "chat_template_kwargs": {"enable_thinking": False}} for row in CHATS]
    ours = prepare_preferences(rows, tokenizer)
    assert_equal(ours, trl_pairs(rows, tokenizer))
    assert "weather" in tokenizer.decode(ours[0]["prompt_ids"])


def test_a_text_beside_chats_is_no_prompt(byte_level, trl_templates):
    """The columns of UltraFeedback: TRL asks to drop `prompt` there."""
    tokenizer = with_template(byte_level, trl_templates, "qwen2_5")
    rows = [row | {"prompt": "What is asked"} for row in IMPLICIT_CHATS]
    assert_equal(prepare_preferences(rows, tokenizer), prepare_preferences(IMPLICIT_CHATS, tokenizer))


def test_long_prompts_are_dropped(byte_level, trl_pairs, caplog):
    lengths = [len(ids) for ids in prepare_preferences(TEXTS, byte_level)["prompt_ids"]]
    limit = sorted(lengths)[-1]
    ours = prepare_preferences(TEXTS, byte_level, limit)
    assert 0 < len(ours) < len(TEXTS)
    assert_equal(ours, trl_pairs(TEXTS, byte_level, limit))
    assert "1 of 3 rows were dropped" in caplog.text
    with pytest.raises(ValueError, match="all 3 prompts have max_length=1 tokens or more"):
        prepare_preferences(TEXTS, byte_level, 1)


def test_prepared_pairs_are_kept(byte_level):
    ours = prepare_preferences(TEXTS, byte_level)
    assert_equal(prepare_preferences(ours, byte_level), ours)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "b"}, "chosen and rejected missing among prompt, completion"),
        ({"prompt": "a", "chosen": "b", "rejected": ASKED}, "both be texts or both"),
        ({"prompt": ASKED, "chosen": "b", "rejected": "c"}, "prompt is a list of messages"),
        ({"chosen": "", "rejected": "c"}, "must not be empty"),
    ],
)
def test_bad_rows(row, message, byte_level):
    with pytest.raises(ValueError, match=message):
        prepare_preferences([row], byte_level)


def test_split_prompt_leaves_no_prompt_where_nothing_is_shared():
    assert split_prompt("a ", "b ") == {"prompt": "", "chosen": "a ", "rejected": "b "}


def test_rows_are_cut_as_trls_collator_cuts_them(byte_level):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    pairs, limit = prepare_preferences(TEXTS, byte_level), 12
    theirs = DataCollatorForPreference(pad_token_id=0, max_length=limit)(pairs.to_list())
    ours = pair_rows(pairs, limit)
    assert max(map(len, ours["input_ids"])) == limit
    halves = np.arange(len(ours)).reshape(-1, 2).T.reshape(-1)  # TRL: first all chosen, then all rejected
    for place, row in enumerate(halves):
        length = len(ours[int(row)]["input_ids"])
        assert theirs["attention_mask"][place].sum() == length
        assert theirs["input_ids"][place, :length].tolist() == ours[int(row)]["input_ids"]
        mask = (np.asarray(ours[int(row)]["labels"]) != -100).astype(int).tolist()
        assert theirs["completion_mask"][place, :length].tolist() == mask


def test_pairs_stay_together():
    pairs = datasets.Dataset.from_list(
        [{"prompt_ids": [1], "chosen_ids": [10 + i], "rejected_ids": [50 + i]} for i in range(7)]
    )
    batches = Batches(
        pair_rows(pairs),
        batch_size=4,
        accumulation=2,
        max_length=None,
        packed=False,
        together=2,
        numbers={"score": np.arange(14.0)},
    )
    assert batches.steps_per_epoch == 2
    seen = []
    for n in range(2):
        batch = batches.step(n)
        assert batch["input_ids"].shape[:2] == (2, 4) and batch["score"].shape == (2, 4, 1)
        second = batch["input_ids"][:, :, 1].reshape(-1, 2)
        real = second[:, 0] > 0
        assert (second[real, 1] == second[real, 0] + 40).all()
        scores = batch["score"].reshape(-1, 2)
        assert (scores[real, 0] == 2 * (second[real, 0] - 10)).all() and not scores[~real].any()
        seen += (second[real, 0] - 10).tolist()
    assert sorted(seen) == list(range(7)) and seen != list(range(7))
