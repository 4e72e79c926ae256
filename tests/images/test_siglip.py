"""Squares of Gemma 3 and Idefics3 on the host."""

import numpy as np
import pytest
from transformers import Gemma3Config, Idefics3Config

from jaxtune import images

VISION = {"image_size": 8, "patch_size": 2}
IMAGE = 7


def gemma():
    config = Gemma3Config(vision_config=VISION, mm_tokens_per_image=4, image_token_index=IMAGE)
    return images.family(config)


def idefics():
    return images.family(Idefics3Config(vision_config=VISION, scale_factor=2, image_token_id=IMAGE))


def ids(*counts: int) -> np.ndarray:
    """A row with a run of four image tokens for each image of `counts`, padded in front to 24."""
    rows = []
    for count in counts:
        row = [1, *([5] + [IMAGE] * 4 + [6]) * count, 2]
        rows.append([0] * (24 - len(row)) + row)
    return np.array(rows)


def batch_arrays(family, rows, mask, processed, *sizes):
    return images.batch_arrays(family, rows, mask, family.rows(processed, rows), *sizes)


def pixels(count: int) -> np.ndarray:
    return np.arange(1, count + 1, dtype=np.float32)[:, None, None, None] * np.ones(
        (count, 3, 8, 8), np.float32
    )


def test_gemmas_images_stand_end_to_end():
    rows = ids(2, 0, 1)
    made = batch_arrays(
        gemma(), rows, rows != 0, {"pixel_values": pixels(3)}, lambda sizes: {"images": sizes["images"] + 1}
    )
    assert made["images"].keys() == {"pixels"} and "rope_positions" not in made
    np.testing.assert_array_equal(made["images"]["pixels"][:, 0, 0, 0], [1, 2, 3, 0])
    np.testing.assert_array_equal(made["image_slots"][rows == IMAGE], np.arange(12))
    assert (made["image_slots"][rows != IMAGE] == -1).all()
    assert gemma().placeholder_ids == {IMAGE, 255_999, 256_000}


def test_idefics_drops_what_pads_the_rows():
    rows, values, mask = ids(1, 2), np.zeros((2, 2, 3, 8, 8), np.float32), np.zeros((2, 2, 8, 8))
    values[0, 0], values[1], mask[0, 0], mask[1] = 1, pixels(2) + 1, 1, 1
    made = batch_arrays(idefics(), rows, rows != 0, {"pixel_values": values, "pixel_attention_mask": mask})
    np.testing.assert_array_equal(made["images"]["pixels"][:, 0, 0, 0], [1, 2, 3])
    text = batch_arrays(idefics(), ids(0, 0), ids(0, 0) != 0, {})
    assert text == {}


def test_errors_name_the_row():
    rows = ids(2, 1)
    with pytest.raises(ValueError, match="2 images were given, and the texts hold 3"):
        batch_arrays(gemma(), rows, rows != 0, {"pixel_values": pixels(2)})
    cut = rows.copy()
    cut[1, 24 - 4] = 3
    with pytest.raises(ValueError, match="row 1: its text has 3 image tokens"):
        batch_arrays(gemma(), cut, cut != 0, {"pixel_values": pixels(3)})
    with pytest.raises(ValueError, match=r"shape \[3, 4, 8\]: the model takes \[3, 8, 8\]"):
        batch_arrays(gemma(), rows, rows != 0, {"pixel_values": pixels(3)[:, :, :4]})
    mask = np.ones((2, 2, 8, 8))
    values = np.ones((2, 2, 3, 8, 8), np.float32)
    with pytest.raises(ValueError, match="row 1: 2 images were given, and its text holds 1"):
        batch_arrays(idefics(), rows, rows != 0, {"pixel_values": values, "pixel_attention_mask": mask})
    mask[1, 1], mask[0, 0, 4:] = 0, 0
    with pytest.raises(ValueError, match="row 0: an image does not fill its square of 8 pixels"):
        batch_arrays(idefics(), rows, rows != 0, {"pixel_values": values, "pixel_attention_mask": mask})
    with pytest.raises(ValueError, match="2 images do not fit into 1"):
        gemma().image_arrays([{"pixel_values": pixels(2)}], {"images": 1})
