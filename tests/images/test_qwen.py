"""The host's side of Qwen2.5-VL and Qwen3-VL against transformers' own functions.

Images go through transformers' Qwen2VLImageProcessorPil: the one of its image processors that needs no torchvision.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2VLImageProcessorPil, Qwen3VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from jaxtune import images

IMAGE, OTHER = 7, 9
GRIDS = [(4, 6), (8, 8), (2, 2), (22, 10), (16, 18)]


def config(kind=Qwen2_5_VLConfig):
    return kind(image_token_id=IMAGE, video_token_id=8, vision_start_token_id=5, vision_end_token_id=6)


def rows_of(host, grids):
    """One row for the first image, one without images, one for all others."""
    rng = np.random.default_rng(0)

    def row(some):
        patches = sum(h * w for h, w in some)
        pixels = rng.standard_normal((patches, host.patch_dim)).astype(np.float32)
        return {"pixel_values": pixels, "image_grid_thw": np.array([(1, h, w) for h, w in some])}

    return [row(grids[:1]), {}, row(grids[1:])]


@pytest.fixture(scope="module")
def packed():
    host = images.family(config())
    rows = rows_of(host, GRIDS)
    sizes = {name: count + 8 for name, count in host.sizes(rows).items()}
    thw = torch.tensor([(1, h, w) for h, w in GRIDS])
    return host, rows, host.image_arrays(rows, sizes), thw


def test_patches_come_in_the_order_of_windows(packed):
    host, rows, arrays, thw = packed
    index, cumulative = get_vision_window_index(thw, 2, host.window_side * 2 * 14, 14)
    by_patch = (index[:, None] * 4 + torch.arange(4)).reshape(-1).numpy()
    count = len(by_patch)
    pixels = np.concatenate([row["pixel_values"] for row in rows if row])
    np.testing.assert_array_equal(arrays["pixels"][:count], pixels[by_patch])
    want = get_vision_position_ids(thw, 2).numpy()
    np.testing.assert_array_equal(arrays["positions"][:count], want[by_patch])
    np.testing.assert_array_equal(arrays["restore"][: count // 4], torch.argsort(index).numpy())
    lengths = np.diff(cumulative.numpy())
    np.testing.assert_array_equal((arrays["windows"] >= 0).sum(1)[: len(lengths)], lengths)
    assert (arrays["windows"][len(lengths) :] == -1).all()
    np.testing.assert_array_equal(arrays["windows"][arrays["windows"] >= 0], np.arange(count))
    np.testing.assert_array_equal(arrays["windows"].reshape(-1)[arrays["places"][:count]], np.arange(count))


def test_images_are_segments(packed):
    _, _, arrays, thw = packed
    cumulative = get_vision_cu_seqlens(thw).numpy()
    np.testing.assert_array_equal(arrays["starts"][: len(GRIDS)], cumulative[:-1])
    assert arrays["starts"][len(GRIDS)] == cumulative[-1] and (arrays["starts"][len(GRIDS) + 1 :] == -1).all()
    np.testing.assert_array_equal(np.bincount(arrays["segments"])[1:], np.diff(cumulative))
    assert (arrays["segments"][cumulative[-1] :] == 0).all()


def test_rope_positions(packed):
    host, rows, _, _ = packed
    model = Qwen2_5_VLModel.__new__(Qwen2_5_VLModel)
    torch.nn.Module.__init__(model)
    model.config = config()
    for row, texts in ((rows[0], [3, 4]), (rows[2], [0, 2, 1, 5, 6])):
        ids = [OTHER] * texts[0]
        for count, text in zip(host.tokens(row), texts[1:], strict=True):
            ids += [IMAGE] * count + [OTHER] * text
        kinds = torch.tensor([[int(token == IMAGE) for token in ids]])
        want, _ = model.get_rope_index(torch.tensor([ids]), kinds, torch.tensor(row["image_grid_thw"]))
        np.testing.assert_array_equal(host.rope_positions(np.array(ids), row), want[:, 0].T.numpy())
        images.check_row(host, np.array(ids), row)
        with pytest.raises(ValueError, match=r"take \[.*and its text has runs of"):
            images.check_row(host, np.array(ids[:-8]), row)
    np.testing.assert_array_equal(
        host.rope_positions(np.array([OTHER] * 3), None), [[i] * 3 for i in range(3)]
    )


def test_learned_positions_are_stretched_over_an_image():
    host = images.family(config(Qwen3VLConfig))
    rows = rows_of(host, GRIDS)
    arrays = host.image_arrays(rows, host.sizes(rows))
    thw = torch.tensor([(1, h, w) for h, w in GRIDS])
    indices, weights = get_vision_interpolation_indices_and_weights(
        thw, host.table_side, align_corners=True, spatial_merge_size=2
    )
    table = np.random.default_rng(1).standard_normal(host.table_side**2)
    got = (table[arrays["table_rows"]] * arrays["table_weights"]).sum(1)
    want = (table[indices.numpy()] * weights.numpy()).sum(1)
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_slots_count_over_the_rows_of_a_micro_batch():
    ids = np.array([[IMAGE, IMAGE, OTHER, OTHER], [OTHER, OTHER, OTHER, OTHER], [OTHER, IMAGE, OTHER, IMAGE]])
    assert images.image_slots(ids, IMAGE).tolist() == [[0, 1, -1, -1], [-1] * 4, [-1, 2, -1, 3]]


def test_tokens_of_processed_images():
    host = images.family(config())
    made = Qwen2VLImageProcessorPil()(
        [Image.new("RGB", (90, 60)), Image.new("RGB", (60, 140))], return_tensors="np"
    )
    assert set(host.processor_keys) == set(made)
    assert host.tokens(made) == [6, 10]
    assert host.sizes([made]) == {"patches": 64, "images": 2, "windows": 3}


def test_what_does_not_fit_is_refused(packed):
    host, rows, _, _ = packed
    sizes = host.sizes(rows)
    with pytest.raises(ValueError, match=r"windows: .* needed, 1 given"):
        host.image_arrays(rows, sizes | {"windows": 1})
    with pytest.raises(ValueError, match="multiple of 4"):
        host.image_arrays(rows, sizes | {"patches": sizes["patches"] + 2})
    with pytest.raises(ValueError, match="videos are not supported"):
        host.sizes([{"image_grid_thw": np.array([[2, 4, 4]])}])
