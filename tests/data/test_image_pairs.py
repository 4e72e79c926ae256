"""Pairs with images: ids and labels are TRL's, both sides go together, errors name the row."""

import logging

import numpy as np
import pytest
import tiny_processors
import tiny_vision
import torch
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from jaxtune.data import VisionBatches, VisionDataCollator, pair_rows, prepare_image_pairs


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return tiny_processors.make_processor(tmp_path_factory.mktemp("processor"))


def make_row(i, answers=("yes", "no no")):
    sides = {
        side: [{"role": "assistant", "content": text}] for side, text in zip(("chosen", "rejected"), answers)
    }
    prompt = [{"role": "user", "content": f"what{'?' * i}"}]
    return {"prompt": prompt, "images": [tiny_vision.picture(60 + 30 * i, 60, i)], **sides}


def as_text(row, processor):
    def render(messages):
        return processor.apply_chat_template(messages)

    parts = [{"type": "image"}, {"type": "text", "text": row["prompt"][0]["content"]}]
    asked = [{"role": "user", "content": parts}]
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True)
    sides = {side: render(asked + row[side]).removeprefix(prompt) for side in ("chosen", "rejected")}
    return {"prompt": prompt, "image": row["images"][0], **sides}


def test_ids_and_labels_are_those_of_trl(processor):
    rows = [make_row(i) for i in range(3)]
    texts = [as_text(row, processor) for row in rows]
    implicit = [
        {"images": row["images"], **{side: row["prompt"] + row[side] for side in ("chosen", "rejected")}}
        for row in rows
    ]
    made = DataCollatorForVisionPreference(processor)([dict(row) for row in rows])
    for data in (rows, texts, implicit):
        pairs = prepare_image_pairs(
            data, VisionDataCollator(tiny_processors.stand_in(), processor, resize="max")
        )
        sides = pair_rows(pairs)
        for i, row in enumerate(sides):
            place = i // 2 + 3 * (i % 2)  # TRL has the chosen sides first
            own = made["attention_mask"][place] == 1
            want = made["input_ids"][place][own]
            trained = torch.where(made["completion_mask"][place][own] == 1, want, -100)
            assert row["input_ids"] == want.tolist() and row["labels"] == trained.tolist()
        assert sides["documents"][:] == [[i] for i in range(6)]


def test_both_sides_of_a_pair_go_together(processor, caplog):
    rows = [make_row(0), make_row(1, ("short", "long " * 40)), make_row(2)]
    collator = VisionDataCollator(tiny_processors.stand_in(), processor, resize="max")
    with caplog.at_level(logging.WARNING):
        pairs = prepare_image_pairs(rows, collator, max_length=100)
    assert "1 of 3 rows are longer than max_length=100: row 1 (" in caplog.text
    assert [collator.document(number).number for number in np.ravel(pairs["documents"][:])] == [0, 0, 2, 2]


def test_errors_name_the_row(processor):
    collator = VisionDataCollator(tiny_processors.stand_in(), processor)
    two = make_row(1) | {"images": ["no such file"]}
    with pytest.raises(ValueError, match="2 of 4 rows cannot be used:\nrow 1: 'no such file' does not exist"):
        prepare_image_pairs([make_row(0), two], collator)
    with pytest.raises(ValueError, match="chosen missing among prompt, images, rejected"):
        prepare_image_pairs(
            [{name: value for name, value in make_row(0).items() if name != "chosen"}], collator
        )


def test_pairs_stay_together_on_devices_and_in_processes(processor):
    """Also in a step that does not fill the devices; the images of a device are those of its pairs."""
    collator = VisionDataCollator(tiny_processors.stand_in(), processor, resize="max")
    sides = pair_rows(prepare_image_pairs([make_row(i) for i in range(7)], collator))
    numbers = {"ref_log_probs": np.arange(14, dtype=np.float32)}

    def batches(devices=4, part=(0, 1)):
        return VisionBatches(
            sides, collator, batch_size=8, max_length=None, packed=False, together=2, numbers=numbers, devices=devices,
            part=part,
        )  # fmt: skip

    one, whole, parts = batches(1), batches(), [batches(part=(i, 2)) for i in range(2)]
    assert one.batch_size == whole.batch_size == 8 and one.steps_per_epoch == 2
    for step in range(4):
        made, halves = whole.step(step), [part.step(step) for part in parts]
        rows = one.rows(step)
        assert (whole.rows(step) == rows).all() and (rows[1::2] == rows[::2] + 1).all()
        got = made["ref_log_probs"].reshape(-1)
        assert got[: len(rows)].tolist() == rows.tolist() and not got[len(rows) :].any()
        for ids, row in zip(made["input_ids"][0], rows):
            own = sides[int(row)]["input_ids"]
            assert ids[: len(own)].tolist() == own
        for device, slots in enumerate(np.split(made["image_slots"], 4, 1)):
            found = slots[slots >= 0]
            assert found.tolist() == list(range(len(found))) and bool(len(found)) == (2 * device < len(rows))
        for name in made.keys() - {"images"}:
            np.testing.assert_array_equal(np.concatenate([half[name] for half in halves], 1), made[name])
        for name, array in made["images"].items():
            np.testing.assert_array_equal(np.concatenate([half["images"][name] for half in halves], 1), array)
    for half, rows in zip(
        [part.own_rows(1) for part in parts], (one.rows(1)[:4], one.rows(1)[4:]), strict=True
    ):
        assert half.tolist() == rows.tolist()
