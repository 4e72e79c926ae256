"""train_on_responses_only: which tokens stay, for tokenizers that merge across the markers' edges."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import transformers

from jaxtune.data import (
    CHAT_TEMPLATES,
    get_chat_template,
    preparation_report,
    prepare_dataset,
    train_on_responses_only,
)
from jaxtune.data.responses import Markers, ResponseMask, detect_markers

CHATML = {"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"}
LLAMA_3 = {
    "instruction_part": "<|start_header_id|>user<|end_header_id|>\n\n",
    "response_part": "<|start_header_id|>assistant<|end_header_id|>\n\n",
}
TALK = [
    ("user", "What is 2+2?"),
    ("assistant", "\n\nIt is 4.\n\n"),
    ("user", "\nSure? "),
    ("assistant", " Yes."),
]


def conversation(talk=TALK):
    return {"messages": [{"role": role, "content": content} for role, content in talk]}


def make_trainer(rows, tokenizer, arguments, eval_rows=None, **changes):
    prepared = prepare_dataset(rows, tokenizer, arguments(**changes))
    evaluation = None if eval_rows is None else prepare_dataset(eval_rows, tokenizer, arguments(**changes))
    return SimpleNamespace(processing_class=tokenizer, train_dataset=prepared, eval_dataset=evaluation)


def trained_texts(tokenizer, row) -> list[str]:
    """Each run of trained tokens, decoded."""
    runs, run = [], []
    for token, label in zip(row["input_ids"] + [0], row["labels"] + [-100], strict=True):
        if label != -100:
            assert label == token
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


@pytest.mark.parametrize("parts", [CHATML, {}], ids=["given", "detected"])
def test_chatml(parts, byte_level, arguments):
    tokenizer = get_chat_template(byte_level, "chatml")
    trainer = make_trainer([conversation()], tokenizer, arguments)
    assert train_on_responses_only(trainer, **parts) is trainer
    trained = trained_texts(tokenizer, trainer.train_dataset[0])
    # the marker's newline and the answer's two are one token here, which belongs to the answer
    assert trained == ["\n\n\nIt is 4.\n\n<|im_end|>\n", " Yes.<|im_end|>\n"]


@pytest.mark.parametrize("parts", [CHATML, {}], ids=["given", "detected"])
def test_smollm2(parts, smollm2, arguments):
    talk = [(role, content.strip()) for role, content in TALK]
    trainer = make_trainer([conversation(talk)], smollm2, arguments)
    train_on_responses_only(trainer, **parts)
    trained = trained_texts(smollm2, trainer.train_dataset[0])
    assert trained == ["It is 4.<|im_end|>\n", "Yes.<|im_end|>\n"]


@pytest.mark.parametrize("question", ["2+2?\n", "2+2?\n\n", " 2+2?", "\n\n2+2?"])
def test_smollm2_merged_edges(question, smollm2, arguments):
    answers = ["\n\nIt is 4.", "\nIt", " It", "\n \n It", "It", ""]
    talks = [[("user", question), ("assistant", answer)] * 2 for answer in answers]
    trainer = make_trainer([conversation(talk) for talk in talks], smollm2, arguments)
    train_on_responses_only(trainer, **CHATML)
    for answer, row in zip(answers, trainer.train_dataset, strict=True):
        trained = trained_texts(smollm2, row)
        assert len(trained) == 2
        for text in trained:
            assert text.endswith(answer + "<|im_end|>\n")
            assert text.strip("\n ") == (answer + "<|im_end|>").strip("\n ")


@pytest.mark.parametrize("parts", [LLAMA_3, {}], ids=["given", "detected"])
@pytest.mark.parametrize("template", ["llama3", "llama3_1"])
def test_llama_3(parts, template, byte_level, arguments, trl_templates):
    byte_level.chat_template = (trl_templates / f"{template}.jinja").read_text()
    trainer = make_trainer([conversation()], byte_level, arguments)
    train_on_responses_only(trainer, **parts)
    trained = trained_texts(byte_level, trainer.train_dataset[0])
    assert trained == ["It is 4.<|eot_id|>", "Yes.<|eot_id|>"]


@pytest.mark.parametrize(
    "template", ["qwen2_5", "qwen3", "gemma", "gemma3", "phi3", "qwen3_instruct_2507", "llama3"]
)
def test_detected_markers_of_the_field(template, byte_level, trl_templates):
    byte_level.chat_template = (trl_templates / f"{template}.jinja").read_text()
    expected = {
        "qwen": ("<|im_start|>user\n", "<|im_start|>assistant\n"),
        "gemm": ("<start_of_turn>user\n", "<start_of_turn>model\n"),
        "phi3": ("<|user|>\n", "<|assistant|>\n"),
        "llam": tuple(LLAMA_3.values()),
    }
    assert detect_markers(byte_level) == Markers(*expected[template[:4]])


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@pytest.mark.parametrize("tokenizer", ["byte_level", "sentencepiece_like"])
def test_every_template_is_detected(name, tokenizer, request, arguments):
    tokenizer = get_chat_template(request.getfixturevalue(tokenizer), name)
    talk = [("user", "What is 2+2?"), ("assistant", "It is 4."), ("user", "Sure?"), ("assistant", "Yes.")]
    trainer = make_trainer([conversation(talk)], tokenizer, arguments)
    train_on_responses_only(trainer)
    trained = trained_texts(tokenizer, trainer.train_dataset[0])
    assert len(trained) == 2
    for text, answer in zip(trained, ("It is 4.", "Yes."), strict=True):
        assert answer in text
        assert "Sure?" not in text and "2+2?" not in text
        assert not text.startswith(detect_markers(tokenizer).response.strip())


def test_text_markers_with_a_sentencepiece_tokenizer(sentencepiece_like, arguments):
    """'### Response:' tokenises differently at the start of a text and after a newline."""
    rows = [{"text": "### Instruction:\nSay hello.\n\n### Response:\nHello there\n\n### Instruction:\nMore."}]
    trainer = make_trainer(rows, sentencepiece_like, arguments)
    train_on_responses_only(trainer, "### Instruction:\n", "### Response:\n")
    assert trained_texts(sentencepiece_like, trainer.train_dataset[0]) == ["Hello there\n\n"]


def test_qwen_vocabulary(shared_data, arguments):
    folder = shared_data / "tokenizers" / "qwen"
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(f"<|im_{side}|>", special=True) for side in ("start", "end")])
    qwen = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    for name in ("chatml", "qwen-2.5", "qwen-3"):
        trainer = make_trainer([conversation()], get_chat_template(qwen, name), arguments)
        train_on_responses_only(trainer)
        trained = trained_texts(qwen, trainer.train_dataset[0])
        assert [text.split("</think>")[-1].strip("\n ") for text in trained] == [
            "It is 4.\n\n<|im_end|>",
            "Yes.<|im_end|>",
        ]


def test_force_match(byte_level, arguments):
    rows = [{"text": "### User: hi\n### Bot:  there\n\n### User: bye\n### Bot:\nnow"}]
    trainer = make_trainer(rows, byte_level, arguments)
    with pytest.raises(ValueError, match="none of the 1 rows"):
        train_on_responses_only(copy.copy(trainer), "### User: ", "### Bot:\n\n")
    train_on_responses_only(trainer, "### User: ", "### Bot:\n\n", force_match=False)
    assert trained_texts(byte_level, trainer.train_dataset[0]) == [" there", "now<|im_end|>"]


def test_typed_markers_are_text(byte_level, arguments):
    """A user who spells a marker with ordinary tokens opens no answer."""
    tokenizer = get_chat_template(byte_level, "chatml")
    spelled = tokenizer("<|im_start|>assistant\n", split_special_tokens=True)["input_ids"]
    assert len(spelled) > 5
    real = tokenizer("<|im_start|>assistant\nyes<|im_end|>")["input_ids"]
    mask = ResponseMask(tokenizer, Markers(*CHATML.values()))([*spelled, *real])
    assert tokenizer.decode(np.asarray([*spelled, *real])[mask]) == "yes<|im_end|>"


def test_tool_turns_between_answers_are_kept(byte_level, arguments):
    talk = [
        ("user", "Weather?"),
        ("assistant", "call"),
        ("tool", "21"),
        ("assistant", "Warm."),
        ("user", "Bye"),
    ]
    tokenizer = get_chat_template(byte_level, "chatml")
    trainer = make_trainer([conversation(talk)], tokenizer, arguments)
    train_on_responses_only(trainer)
    assert trained_texts(tokenizer, trainer.train_dataset[0]) == [
        "call<|im_end|>\n<|im_start|>tool\n21<|im_end|>\n<|im_start|>assistant\nWarm.<|im_end|>\n"
    ]


def test_last_response_only(byte_level, arguments):
    tokenizer = get_chat_template(byte_level, "chatml")
    trainer = make_trainer([conversation()], tokenizer, arguments)
    train_on_responses_only(trainer, last_response_only=True)
    assert trained_texts(tokenizer, trainer.train_dataset[0]) == [" Yes.<|im_end|>\n"]


def test_earlier_masks_stay(byte_level, arguments):
    tokenizer = get_chat_template(byte_level, "chatml")
    messages = conversation()["messages"]
    rows = [{"prompt": messages[:3], "completion": messages[3:]}]
    trainer = make_trainer(rows, tokenizer, arguments)  # completion only: the first answer is masked
    train_on_responses_only(trainer)
    assert trained_texts(tokenizer, trainer.train_dataset[0]) == [" Yes.<|im_end|>\n"]


def test_rows_without_an_answer_are_dropped_and_counted(byte_level, arguments):
    tokenizer = get_chat_template(byte_level, "chatml")
    rows = [
        conversation(),
        conversation(TALK[:1]),
        conversation([("user", "long " * 99), *TALK[1:2]]),
        conversation(),
    ]
    trainer = make_trainer(rows, tokenizer, arguments, eval_rows=rows, max_length=90)
    trainer.eval_dataset = {"short": trainer.eval_dataset}
    train_on_responses_only(trainer)
    for dataset in (trainer.train_dataset, trainer.eval_dataset["short"]):
        report = preparation_report(dataset)
        assert (report.rows_in, report.rows, report.dropped, report.truncated) == (4, 2, 2, 1)
        assert len(dataset) == 2


def test_all_masked_says_why(byte_level, arguments):
    tokenizer = get_chat_template(byte_level, "chatml")
    trainer = make_trainer([conversation()] * 3, tokenizer, arguments, max_length=8)
    with pytest.raises(ValueError) as caught:
        train_on_responses_only(trainer, **CHATML)
    for said in (
        "none of the 3 rows",
        "'<|im_start|>assistant\\n'",
        "3 rows were cut to max_length=8,",
        "What is",
    ):
        assert said in str(caught.value)
    assert len(trainer.train_dataset) == 3


def test_a_useless_evaluation_set_leaves_the_trainer_as_it_was(byte_level, arguments):
    tokenizer = get_chat_template(byte_level, "chatml")
    trainer = make_trainer([conversation()], tokenizer, arguments, eval_rows=[conversation(TALK[:1])])
    before = trainer.train_dataset
    with pytest.raises(ValueError, match="none of the 1 rows"):
        train_on_responses_only(trainer)
    assert trainer.train_dataset is before


@pytest.mark.parametrize("parts", [{"instruction_part": "a"}, {"response_part": "b"}])
def test_one_part_alone_is_refused(parts, byte_level):
    with pytest.raises(ValueError, match="both instruction_part and response_part"):
        train_on_responses_only(SimpleNamespace(processing_class=byte_level), **parts)


def test_no_template_to_detect(byte_level):
    with pytest.raises(ValueError, match="no chat template to read the markers from"):
        train_on_responses_only(SimpleNamespace(processing_class=byte_level))
    byte_level.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    with pytest.raises(ValueError, match="does not tell them apart"):
        train_on_responses_only(SimpleNamespace(processing_class=byte_level))
    byte_level.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ValueError, match="cannot read the markers"):
        train_on_responses_only(SimpleNamespace(processing_class=byte_level))


def test_return_function(byte_level):
    tokenizer = get_chat_template(byte_level, "chatml")
    function = train_on_responses_only(None, tokenizer=tokenizer, return_function=True)
    ids = tokenizer("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>")["input_ids"]
    labels = function({"input_ids": [ids, ids], "labels": [ids, [-100] * len(ids)]})["labels"]
    assert tokenizer.decode([token for token in labels[0] if token != -100]) == "ho<|im_end|>"
    assert set(labels[1]) == {-100}
