"""Images on the host for towers that see squares of one size: Gemma 3's, Idefics3's and SmolVLM's.

The processor scales an image to such a square, or cuts it into several and one of the whole; each becomes one run of
equally many tokens. Such a square is called an image here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Processed = Mapping[str, np.ndarray]


class SquareImages:
    """What these families share; see `images.VisionFamily`. each: tokens of an image."""

    processor_keys: tuple[str, ...] = ("pixel_values",)
    image_token_id: int
    placeholder_ids: frozenset[int]
    each: int

    def __init__(self, config: Any):
        vision = config.vision_config
        self.image_token_id = config.image_token_id
        self.shape = (vision.num_channels, vision.image_size, vision.image_size)

    def _counts(self, input_ids: Sequence[np.ndarray]) -> list[int]:
        """Images of each row, by their tokens."""
        found = [int(np.sum(np.asarray(ids) == self.image_token_id)) for ids in input_ids]
        for number, tokens in enumerate(found):
            if tokens % self.each:
                raise ValueError(
                    f"row {number}: its text has {tokens} image tokens (token {self.image_token_id}), which are not "
                    f"those of whole images of {self.each}"
                )
        return [tokens // self.each for tokens in found]

    def _check(self, pixels: np.ndarray) -> None:
        if pixels.shape[1:] != self.shape:
            raise ValueError(
                f"images of shape {list(pixels.shape[1:])}: the model takes {list(self.shape)}; use its own processor"
            )

    def rows(self, processed: Processed, input_ids: Sequence[np.ndarray]) -> list[Processed]:
        """The images of a batch stand in one array, row after row."""
        pixels = np.asarray(processed.get("pixel_values", np.zeros((0, *self.shape))), np.float32)
        self._check(pixels)
        counts = self._counts(input_ids)
        if sum(counts) != len(pixels):
            raise ValueError(f"{len(pixels)} images were given, and the texts hold {sum(counts)}")
        ends = np.cumsum(counts)
        return [{"pixel_values": pixels[end - n : end]} for n, end in zip(counts, ends, strict=True)]

    def tokens(self, row: Processed) -> list[int]:
        """The same for each image."""
        return [self.each] * len(row.get("pixel_values", ()))

    def sizes(self, rows: Sequence[Processed]) -> dict[str, int]:
        """images: at least 1."""
        return {"images": max(sum(len(self.tokens(row)) for row in rows), 1)}

    def image_arrays(self, rows: Sequence[Processed], sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        """pixels float32 [images, channels, side, side]; padding is 0."""
        count = self.sizes(rows)["images"]
        if count > sizes["images"]:
            raise ValueError(f"{count} images do not fit into {sizes['images']}")
        pixels = np.zeros((sizes["images"], *self.shape), np.float32)
        at = 0
        for row in rows:
            values = row.get("pixel_values", pixels[:0])
            pixels[at : at + len(values)] = values
            at += len(values)
        return {"pixels": pixels}

    def rope_positions(self, input_ids: np.ndarray, row: Processed | None) -> None:
        """Rotary positions are the tokens' numbers."""
        return None


class Gemma3Images(SquareImages):
    """Squares of 896 pixels, 256 tokens each; crops of an image (pan and scan) are images of their own."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.each = config.mm_tokens_per_image
        self.placeholder_ids = frozenset((config.image_token_id, config.boi_token_id, config.eoi_token_id))


class Idefics3Images(SquareImages):
    """The tiles of an image and the whole of it, each the tower's square."""

    processor_keys = ("pixel_values", "pixel_attention_mask")

    def __init__(self, config: Any):
        super().__init__(config)
        side = config.vision_config.image_size // config.vision_config.patch_size
        self.each = (side // config.scale_factor) ** 2
        self.placeholder_ids = frozenset((config.image_token_id,))

    def rows(self, processed: Processed, input_ids: Sequence[np.ndarray]) -> list[Processed]:
        """The images of each row stand in its own array, behind them such as pad it."""
        pixels = np.asarray(
            processed.get("pixel_values", np.zeros((len(input_ids), 0, *self.shape))), np.float32
        )
        mask = np.asarray(
            processed.get("pixel_attention_mask", np.ones((*pixels.shape[:2], *self.shape[1:])))
        )
        rows, counts = [], self._counts(input_ids)
        for number, (count, images, seen) in enumerate(zip(counts, pixels, mask, strict=True)):
            self._check(images)
            given = int(np.sum(seen.any((1, 2))))
            if given != count:
                raise ValueError(f"row {number}: {given} images were given, and its text holds {count}")
            if not seen[:count].all():
                raise ValueError(
                    f"row {number}: an image does not fill its square of {self.shape[1]} pixels (pixel_attention_mask "
                    "has zeros); use the model's own processor"
                )
            rows.append({"pixel_values": images[:count]})
        return rows
