"""The host's side of vision-language models, in NumPy alone: what a family makes of processed images before the device.

transformers' own processor decodes, resizes and cuts images into arrays; a `VisionFamily` says how many tokens they
take, how positions run around them, and packs the images of a micro-batch into arrays of few shapes. It knows
nothing of the model: worker processes import it without jax.

To add a family: a class here that fits `VisionFamily`, and one line in FAMILIES.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jaxtune.images.mllama import MllamaImages
from jaxtune.images.qwen import Qwen2_5VLImages, Qwen3VLImages
from jaxtune.images.siglip import Gemma3Images, Idefics3Images

# What the processor gave for one row (its images, in order): "pixel_values" and what else the family needs.
Processed = Mapping[str, np.ndarray]
# What processors say of each token beside its id; it follows from the ids.
TOKEN_KINDS = ("mm_token_type_ids", "token_type_ids", "cross_attention_mask")
# Lengths of the axes that depend on the images, by name: {"patches": 4096, "images": 4, …}.
Sizes = Mapping[str, int]


class VisionFamily(Protocol):
    """The host's side of one model.

    Attributes:
      image_token_id: the token that stands, once for each row of the tower's output, where an image is.
      placeholder_ids: tokens that mark images and are never a label: that one, those around it, those of videos.
      processor_keys: entries of the processor's output that belong to the images of a row.
    """

    image_token_id: int
    placeholder_ids: frozenset[int]
    processor_keys: tuple[str, ...]

    def rows(self, processed: Processed, input_ids: Sequence[np.ndarray]) -> list[Processed]:
        """What the processor gave for a whole batch, row by row; `input_ids` (int [T] each) say how many each has.

        Raises:
          ValueError: texts and images do not go together.
        """
        ...

    def tokens(self, row: Processed) -> list[int]:
        """How many image tokens each image of a row takes."""
        ...

    def sizes(self, rows: Sequence[Processed]) -> dict[str, int]:
        """The least lengths that `image_arrays` can pack these rows' images into; every length may be larger."""
        ...

    def image_arrays(self, rows: Sequence[Processed], sizes: Sizes) -> dict[str, np.ndarray]:
        """The arrays `batch["images"]` of a micro-batch: its images in order, padded to `sizes`; no batch axis.

        Raises:
          ValueError: they do not fit.
        """
        ...

    def rope_positions(self, input_ids: np.ndarray, row: Processed | None) -> np.ndarray | None:
        """int32 [T, 3], the rotary positions of one row's tokens (time, height, width); None where the family's
        rotary positions are the tokens' numbers.

        Args:
          input_ids: int [T], without padding. row: its images, None where it has none.
        """
        ...


FAMILIES: dict[str, Callable[[Any], VisionFamily]] = {
    "qwen2_5_vl": Qwen2_5VLImages,
    "qwen3_vl": Qwen3VLImages,
    "gemma3": Gemma3Images,
    "idefics3": Idefics3Images,
    "smolvlm": Idefics3Images,
    "mllama": MllamaImages,
}


def family(config) -> VisionFamily | None:
    """The host's side of a transformers config; None for a model that takes no images."""
    make = FAMILIES.get(config.model_type)
    return None if make is None else make(config)


def image_slots(input_ids: np.ndarray, image_token_id: int) -> np.ndarray:
    """Which row of the tower's output each token takes in place of its embedding, -1 for text: int32, shape of the ids.

    The rows count up over the whole micro-batch [B, T], row after row, as `image_arrays` packs the images.
    """
    is_image = np.asarray(input_ids) == image_token_id
    count = np.cumsum(is_image.reshape(-1)).reshape(is_image.shape) - 1
    return np.where(is_image, count, -1).astype(np.int32)


def check_row(images: VisionFamily, input_ids: np.ndarray, row: Processed | None) -> None:
    """Raises ValueError unless a row's image tokens stand in one run for each image, each of that image's length."""
    want = [] if row is None else images.tokens(row)
    found = _runs(np.asarray(input_ids) == images.image_token_id)
    if found != want and not (
        set(want) == {1} and sum(found) == len(want)
    ):  # of one token each: side by side
        raise ValueError(
            f"the images of this row take {want} tokens (token {images.image_token_id}), and its text has runs of "
            f"{found}; give each image one placeholder, with text or the family's own marks between two, and cut no "
            "row inside an image"
        )


def batch_arrays(
    images: VisionFamily,
    input_ids: np.ndarray,
    mask: np.ndarray,
    rows: Sequence[Processed],
    sizes: Callable[[dict[str, int]], Sizes] = dict,
) -> dict[str, Any]:
    """What a batch of rows, one document each, needs on the device beside its ids to see its images.

    Args:
      input_ids: int [B, T], padded on either side. mask: int [B, T], 1 at tokens.
      rows: the images of each row (see `VisionFamily.rows`); without images they are text.
      sizes: the least lengths of `VisionFamily.sizes` -> those to pad to.

    Returns:
      image_slots int32 [B, T], images (the family's arrays), and rope_positions int32 [B, T, 3] where it has them.

    Raises:
      ValueError: texts and images do not go together; says which row.
    """
    kept = np.asarray(mask) != 0
    texts = [ids[own] for ids, own in zip(input_ids, kept, strict=True)]
    arrays: dict[str, Any] = {}
    rope = np.zeros((*kept.shape, 3), np.int32)
    for number, (text, row) in enumerate(zip(texts, rows, strict=True)):
        try:
            check_row(images, text, row)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from None
        positions = images.rope_positions(text, row)
        if positions is not None:
            rope[number, kept[number]] = positions
            arrays["rope_positions"] = rope
    if any(images.tokens(row) for row in rows):
        slots = image_slots(np.where(kept, input_ids, -1), images.image_token_id)
        arrays |= {"image_slots": slots, "images": images.image_arrays(rows, sizes(images.sizes(rows)))}
    return arrays


def _runs(flags: np.ndarray) -> list[int]:
    """Lengths of the runs of True in bool [T]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]])))
    return (edges[1::2] - edges[::2]).tolist()
