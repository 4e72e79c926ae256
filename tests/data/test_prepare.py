"""Dropping, counting, truncating, caching: what happens around the tokens."""

import logging

import datasets
import pytest

from jaxtune.config import SFTConfig
from jaxtune.data import get_chat_template, preparation_report, prepare_dataset, train_on_responses_only

PAIRS = [{"prompt": "a " * repeats, "completion": "42 " * 10} for repeats in (1, 40, 2, 30)]


def test_reads_the_real_config(byte_level, tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), max_length=30)
    assert preparation_report(prepare_dataset(PAIRS, byte_level, args)).truncated > 0


def test_report_and_log(byte_level, arguments, caplog):
    with caplog.at_level(logging.WARNING, "jaxtune"):
        dataset = prepare_dataset(PAIRS, byte_level, arguments(max_length=24))
    report = preparation_report(dataset)
    assert (report.rows_in, report.rows, report.dropped) == (4, 2, 2)
    assert (report.truncated, report.longest) == (2, 52)
    assert "2 of 4 rows were dropped" in caplog.text
    assert "2 of 4 rows were cut to max_length=24 tokens (the longest had 52)" in caplog.text
    assert preparation_report(datasets.Dataset.from_list(PAIRS)) is None


def test_masked_rows_are_dropped_when_packing_too(byte_level, arguments):
    for strategy, rows in (("bfd", 2), ("bfd_split", 4), ("wrapped", 4)):
        args = arguments(max_length=24, packing=True, packing_strategy=strategy)
        dataset = prepare_dataset(PAIRS, byte_level, args)
        assert len(dataset) == rows, strategy
        assert preparation_report(dataset).dropped == 4 - rows
        assert (max(map(len, dataset["input_ids"])) > 24) == (strategy != "bfd")


def test_all_masked_says_why(byte_level, arguments):
    with pytest.raises(ValueError) as caught:
        prepare_dataset(PAIRS[1:2] * 3, byte_level, arguments(max_length=12))
    for said in ("all 3 rows", "max_length=12", "first trained token is number 4", "a a a a"):
        assert said in str(caught.value)
    rows = [{"input_ids": [5, 6], "labels": [-100, -100]}]
    with pytest.raises(ValueError, match="none was marked for training"):
        prepare_dataset(rows, byte_level, arguments())


def test_empty_conversations_are_dropped(byte_level, arguments):
    tokenizer = get_chat_template(byte_level, "chatml")
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    rows = [{"messages": talk}, {"messages": []}, {"messages": talk}]
    for assistant_only in (False, True):
        dataset = prepare_dataset(rows, tokenizer, arguments(assistant_only_loss=assistant_only))
        assert preparation_report(dataset).dropped == 1


def test_assistant_only_without_an_answer_is_dropped_not_fatal(byte_level, arguments):
    tokenizer = get_chat_template(byte_level, "chatml")
    question = [{"role": "user", "content": "Hi"}]
    rows = [{"messages": question}, {"messages": [*question, {"role": "assistant", "content": "Ho"}]}]
    dataset = prepare_dataset(rows, tokenizer, arguments(assistant_only_loss=True))
    assert (len(dataset), preparation_report(dataset).dropped) == (1, 1)
    with pytest.raises(ValueError, match="assistant_only_loss=True"):
        prepare_dataset(rows[:1], tokenizer, arguments(assistant_only_loss=True))


def test_assistant_only_needs_conversations(byte_level, arguments):
    with pytest.raises(ValueError, match=r"format is prompt_completion \(columns prompt, completion\)"):
        prepare_dataset(PAIRS, byte_level, arguments(assistant_only_loss=True))


def test_assistant_only_with_smollm2(smollm2, arguments):
    """TRL refuses this template; its answers are found all the same."""
    talk = [
        {"role": role, "content": f"{role}\n\n{turn} "} for turn in range(2) for role in ("user", "assistant")
    ]
    row = prepare_dataset([{"messages": talk}], smollm2, arguments(assistant_only_loss=True))[0]
    trained = smollm2.decode([label for label in row["labels"] if label != -100])
    assert trained == "assistant\n\n0 <|im_end|>\nassistant\n\n1 <|im_end|>\n"


def test_assistant_only_refuses_a_template_that_rewrites_the_past(byte_level, arguments):
    byte_level.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    )
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    with pytest.raises(ValueError, match="train_on_responses_only"):
        prepare_dataset([{"messages": talk}], byte_level, arguments(assistant_only_loss=True))


def test_completion_only_without_completions_warns(byte_level, arguments, caplog):
    with caplog.at_level(logging.WARNING, "jaxtune"):
        prepare_dataset([{"text": "a"}], byte_level, arguments(completion_only_loss=True))
    assert "completion_only_loss=True has no effect" in caplog.text


def test_changed_prompts_are_counted(byte_level, arguments, caplog):
    rows = [{"prompt": "a ", "completion": "42"}, {"prompt": "a", "completion": " 42"}]
    with caplog.at_level(logging.WARNING, "jaxtune"):
        prepare_dataset(rows, byte_level, arguments())
    assert "in 1 of 2 rows the prompt's tokens change" in caplog.text


def test_nothing_is_stale(byte_level, arguments, tmp_path):
    """A dataset on disk, prepared again after each change of what is not the dataset."""
    path = tmp_path / "rows.jsonl"
    datasets.Dataset.from_list(PAIRS).to_json(path)
    stored = datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    stored = stored.map(lambda row: {"text": row["prompt"]}).select_columns(["text"])
    wording = {"prefix": "one "}

    def formatting(row):
        return wording["prefix"] + row["text"]

    def first():
        return byte_level.decode(prepare_dataset(stored, byte_level, arguments(), formatting)[0]["input_ids"])

    assert first().startswith("one a")
    wording["prefix"] = "two "
    assert first().startswith("two a")
    files = sorted(tmp_path.rglob("cache-*.arrow"))
    first()
    assert sorted(tmp_path.rglob("cache-*.arrow")) == files  # nothing left behind either


def test_template_change_is_seen(byte_level, arguments):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    dataset = datasets.Dataset.from_list([{"messages": talk}])
    chatml = prepare_dataset(dataset, get_chat_template(byte_level, "chatml"), arguments())
    zephyr = prepare_dataset(dataset, get_chat_template(byte_level, "zephyr"), arguments())
    assert chatml[0] != zephyr[0]


def test_fingerprint_follows_the_tokens(byte_level, arguments):
    one = prepare_dataset(PAIRS, byte_level, arguments())
    assert one._fingerprint == prepare_dataset(PAIRS, byte_level, arguments())._fingerprint
    assert one._fingerprint != prepare_dataset(PAIRS, byte_level, arguments(max_length=40))._fingerprint


def test_columns_and_types(byte_level, arguments):
    dataset = prepare_dataset([row | {"source": "x"} for row in PAIRS], byte_level, arguments())
    assert dataset.column_names == ["input_ids", "labels"]
    assert {dataset.features[column].feature.dtype for column in dataset.column_names} == {"int32"}


def test_reports_add_up(byte_level, arguments):
    tokenizer = get_chat_template(byte_level, "chatml")
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    rows = [{"messages": talk}, {"messages": talk[:1]}, {"messages": []}]
    trainer = type("Trainer", (), {})()
    trainer.processing_class, trainer.eval_dataset = tokenizer, None
    trainer.train_dataset = prepare_dataset(rows, tokenizer, arguments())
    train_on_responses_only(trainer)
    report = preparation_report(trainer.train_dataset)
    assert (report.rows_in, report.rows, report.dropped) == (3, 1, 2)


def test_chat_template_path(byte_level, arguments, tmp_path, trl_templates):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    path = str(trl_templates / "llama3.jinja")
    row = prepare_dataset([{"messages": talk}], byte_level, arguments(chat_template_path=path))[0]
    assert byte_level.decode(row["input_ids"]).endswith("assistant<|end_header_id|>\n\nHo<|eot_id|>")
    get_chat_template(byte_level, "gemma").save_pretrained(tmp_path)
    fresh = type(byte_level).from_pretrained(tmp_path)
    fresh.chat_template, fresh.eos_token = None, "<|im_end|>"
    row = prepare_dataset([{"messages": talk}], fresh, arguments(chat_template_path=str(tmp_path)))[0]
    assert fresh.decode(row["input_ids"]).endswith("<start_of_turn>model\nHo<end_of_turn>\n")
    assert fresh.eos_token == "<end_of_turn>"


def test_skip_prepare(byte_level, arguments):
    args = arguments(dataset_kwargs={"skip_prepare_dataset": True}, max_length=2)
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]
    assert prepare_dataset(rows, byte_level, args)[0] == rows[0]
    with pytest.raises(ValueError, match="needs the column input_ids; the dataset has text"):
        prepare_dataset([{"text": "a"}], byte_level, args)


def test_formats_of_the_dataset_object(byte_level, arguments):
    dataset = datasets.Dataset.from_list(PAIRS)
    expected = prepare_dataset(dataset, byte_level, arguments())[:]
    assert prepare_dataset(dataset.with_format("numpy"), byte_level, arguments())[:] == expected
    with pytest.raises(ValueError, match="with_transform"):
        prepare_dataset(dataset.with_transform(dict), byte_level, arguments())


def test_labels_of_another_length(byte_level, arguments):
    rows = [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [5, 6, 7], "labels": [5]}]
    with pytest.raises(ValueError, match="row 1 has 3 input_ids but 1 labels"):
        prepare_dataset(rows, byte_level, arguments())
