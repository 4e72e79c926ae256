"""SFTTrainer on rows with images and a tiny Qwen2.5-VL: losses as transformers', compilations, resume, packing.

Images go through transformers' Qwen2VLImageProcessorPil.
"""

import datasets
import jax
import numpy as np
import pytest
import tiny_mllama
import tiny_siglip
import tiny_vision
import tolerances
import torch

from jaxtune import FastVisionModel, SFTConfig, SFTTrainer, train_on_responses_only
from jaxtune.data import UnslothVisionDataCollator, VisionBatches, VisionDataCollator
from jaxtune.training_loop import largest_eval_batch

pytestmark = pytest.mark.usefixtures("quick_compilation")


def rows(count: int = 12) -> list[dict]:
    """Conversations of one or two images, in Unsloth's format, one in four of text alone."""
    sizes = [(60, 60), (90, 60), (60, 120), (120, 120)]

    def picture(number):
        return {"type": "image", "image": tiny_vision.picture(*sizes[number % 4], number)}

    def row(i):
        seen = [[picture(i)], [picture(i), picture(i + 1)], [], [picture(i)]][i % 4]
        asked = [*seen, {"type": "text", "text": "what" + "?" * (i % 5)}]
        answer = [{"type": "text", "text": f"it is {i}"}]
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}

    return [row(i) for i in range(count)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """transformers' model, and the same in jaxtune with its processor."""
    theirs = tiny_vision.make_model(
        tiny_vision.make_config(
            "qwen2_5_vl",
            text_config={"num_hidden_layers": 2},
            vision_config={"depth": 2, "fullatt_block_indexes": [1]},
        )
    )
    folder = tiny_vision.save(theirs, tmp_path_factory.mktemp("qwen2_5_vl"))
    model, processor = FastVisionModel.from_pretrained(
        str(folder), max_seq_length=256, dtype="float32", load_in_4bit=False
    )
    return theirs, model, processor


def make_trainer(both, folder, *, workers=0, data=None, **settings) -> SFTTrainer:
    _, base, processor = both
    model = FastVisionModel.get_peft_model(base, r=4)
    defaults = {
        "max_length": 200,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,  # as Unsloth's notebooks have it
        "dataset_text_field": "",
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    return SFTTrainer(
        model=model,
        tokenizer=processor,
        data_collator=UnslothVisionDataCollator(model, processor, num_proc=workers),
        train_dataset=rows() if data is None else data,
        eval_dataset=rows(5),
        args=SFTConfig(str(folder), **defaults | settings),
    )


def losses(trainer) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


@pytest.fixture(scope="module")
def trained(both, tmp_path_factory):
    trainer = make_trainer(
        both, tmp_path_factory.mktemp("whole"), max_steps=6, save_strategy="steps", save_steps=4
    )
    trainer.before = trainer.evaluate()
    trainer.train()
    return trainer


def test_it_learns(trained):
    assert losses(trained)[-1] < losses(trained)[0]
    assert trained.evaluate()["eval_loss"] < trained.before["eval_loss"]


def test_evaluation_is_that_of_transformers(both, trained):
    """Adapters begin with no effect."""
    theirs, _, processor = both
    want = transformers_loss(theirs, VisionDataCollator(trained.model, processor), rows(5))
    np.testing.assert_allclose(trained.before["eval_loss"], want, rtol=tolerances.LOSS)


def transformers_loss(theirs, collator, data) -> float:
    """The mean loss over the rows' labels, each row alone through transformers' model."""
    total = count = 0.0
    for row in data:
        batch = {name: torch.tensor(value) for name, value in collator([row]).items()}
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = theirs(**batch).logits[0, :-1]
        kept = labels[0, 1:] != -100
        total += torch.nn.functional.cross_entropy(logits[kept], labels[0, 1:][kept], reduction="sum").item()
        count += kept.sum().item()
    return total / count


def test_the_largest_evaluation_batch_is_one_of_them(trained):
    """That with the most tokens and patches, as evaluation has it."""
    batches = trained._batches(trained.eval_dataset, train=False)
    all_batches = list(batches.eval_batches())
    assert len(all_batches) > 1
    largest = largest_eval_batch(batches)
    want = all_batches[batches.largest_step]
    assert shapes_of(largest) == shapes_of(want)
    np.testing.assert_array_equal(largest["input_ids"], want["input_ids"])


def test_few_shapes_are_compiled(trained):
    batches = trained._make_batches()
    assert isinstance(batches, VisionBatches)
    assert trained.compilations <= len(batches.shapes) <= 5
    many = make_trainer(
        (None, *both_of(trained)), trained.args.output_dir + "/many", data=rows(40), per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
    )  # fmt: skip
    batches = many._make_batches()
    assert len({str(shapes_of(batches.step(step))) for step in range(80)}) <= len(batches.shapes) <= 5


def both_of(trainer):
    base = trainer.model
    return FastVisionModel.from_pretrained(
        base.name_or_path, max_seq_length=256, dtype="float32", load_in_4bit=False
    )


def shapes_of(batch):
    return jax.tree.map(lambda array: array.shape, batch)


def test_a_resumed_run_is_the_same_run(both, trained, tmp_path):
    resumed = make_trainer(both, trained.args.output_dir, max_steps=6, save_strategy="steps", save_steps=4)
    resumed.train(resume_from_checkpoint=f"{trained.args.output_dir}/checkpoint-4")
    assert losses(resumed) == losses(trained)
    for name, leaf in trained.model.trainable.items():
        np.testing.assert_array_equal(
            np.asarray(leaf), np.asarray(resumed.model.trainable[name]), err_msg=name
        )


def test_other_images_do_not_resume(both, trained):
    changed = rows()
    changed[0]["messages"][0]["content"][0]["image"] = tiny_vision.picture(60, 60, 99)
    other = make_trainer(both, trained.args.output_dir, max_steps=6, data=changed)
    with pytest.raises(ValueError, match=r"images \(digest\)"):
        other.train(resume_from_checkpoint=f"{trained.args.output_dir}/checkpoint-4")


def test_packed_rows_have_the_same_loss(both, trained):
    """Several conversations with images in a row see their own images and positions alone."""
    packed = make_trainer(both, trained.args.output_dir + "/packed", packing=True)
    assert len(packed._batches(packed.eval_dataset, train=False).rows(0)) < 5
    np.testing.assert_allclose(
        packed.evaluate()["eval_loss"], trained.before["eval_loss"], rtol=tolerances.LOSS
    )


def test_workers_change_nothing(both, trained, tmp_path):
    with_workers = make_trainer(both, tmp_path, max_steps=6, workers=None, dataloader_num_workers=1)
    with_workers.train()
    assert losses(with_workers) == losses(trained)
    assert with_workers._collator._pool is None  # the processes are gone


def test_responses_only(both, tmp_path):
    masked = train_on_responses_only(make_trainer(both, tmp_path))
    decode = masked._collator.tokenizer.decode
    said = [decode([label for label in row["labels"] if label >= 0]) for row in masked.train_dataset]
    assert said[:2] == ["it is 0<|im_end|>\n", "it is 1<|im_end|>\n"]


def test_rows_of_the_evaluation_are_named_as_such(both, tmp_path):
    _, base, _ = both
    model = FastVisionModel.get_peft_model(base, r=4)
    bad = [*rows(1), {"messages": 5}]
    for data, name in ((bad, "eval_dataset"), ({"dev": bad}, r"eval_dataset\['dev'\]")):
        with pytest.raises(ValueError, match=f"{name}: 1 of 2 rows cannot be used:\nrow 1: no known format"):
            SFTTrainer(
                model=model,
                train_dataset=rows(1),
                eval_dataset=data,
                args=SFTConfig(output_dir=str(tmp_path), disable_tqdm=True),
            )


def test_a_collator_is_made_where_rows_have_images(both, tmp_path):
    _, base, processor = both
    model = FastVisionModel.get_peft_model(base, r=4)
    args = SFTConfig(str(tmp_path), max_length=200, disable_tqdm=True)
    trainer = SFTTrainer(model=model, args=args, train_dataset=rows(3))
    assert isinstance(trainer._collator, VisionDataCollator) and trainer.processing_class is processor
    text = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3
    assert SFTTrainer(model=model, args=args, train_dataset=text)._collator is None
    tiny_vision.picture(40, 40, 1).save(tmp_path / "a.png")
    shown = [{"type": "image", "image": str(tmp_path / "a.png")}, {"type": "text", "text": "what"}]
    talks = [(shown[1:], "a"), (shown, "b")]  # the first row has none
    later = [
        {
            "messages": [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": [{"type": "text", "text": said}]},
            ]
        }
        for asked, said in talks
    ]
    made = SFTTrainer(model=model, args=args, train_dataset=datasets.Dataset.from_list(later))
    assert isinstance(made._collator, VisionDataCollator)
    with pytest.raises(ValueError, match="formatting_func is not for rows with images"):
        SFTTrainer(model=model, args=args, train_dataset=rows(3), formatting_func=str)


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "smolvlm", "mllama"])
def test_other_families_packed(family, tmp_path):
    """The loss over packed rows, against transformers' model on each row alone."""
    tiny = {"qwen3_vl": tiny_vision, "mllama": tiny_mllama}.get(family, tiny_siglip)
    theirs = tiny.make_model(tiny.make_config(family))
    folder = tiny.save(theirs, tmp_path / "model")
    base, processor = FastVisionModel.from_pretrained(
        str(folder), max_seq_length=256, dtype="float32", load_in_4bit=False
    )
    packed = make_trainer(
        (theirs, base, processor), tmp_path / "out", data=rows(1), packing=True, max_length=250
    )
    want = transformers_loss(theirs, packed._collator, rows(5))
    np.testing.assert_allclose(packed.evaluate()["eval_loss"], want, rtol=tolerances.LOSS)


def test_a_step_without_images_is_finite(both, tmp_path):
    """The tower runs on padding alone, and nothing of that reaches the gradients."""
    text = make_trainer(both, tmp_path, data=rows()[2::4], per_device_train_batch_size=1, max_steps=1)
    text.train()
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in text.model.trainable.values())
