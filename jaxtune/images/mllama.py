"""Llama 3.2 Vision's images on the host: up to four tiles each, one token each in the text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Processed = Mapping[str, np.ndarray]


class MllamaImages:
    """See `images.VisionFamily`."""

    processor_keys: tuple[str, ...] = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")

    def __init__(self, config: Any):
        vision = config.vision_config
        self.image_token_id = config.image_token_id
        self.placeholder_ids = frozenset((config.image_token_id,))
        self.shape = (vision.max_num_tiles, vision.num_channels, vision.image_size, vision.image_size)

    def rows(self, processed: Processed, input_ids: Sequence[np.ndarray]) -> list[Processed]:
        """The images of each row stand in its own array, behind them such as pad it."""
        if "pixel_values" not in processed:
            return [{} for _ in input_ids]
        rows: list[Processed] = []
        arrays = [np.asarray(processed[name]) for name in self.processor_keys]
        if arrays[0].shape[2:] != self.shape:
            raise ValueError(
                f"images of shape {list(arrays[0].shape[2:])}: the model takes {list(self.shape)}; use its processor"
            )
        for number, (ids, pixels, shapes, tiles) in enumerate(zip(input_ids, *arrays, strict=True)):
            count, given = int(np.sum(np.asarray(ids) == self.image_token_id)), int(np.sum(shapes > 0))
            if given != count:
                raise ValueError(f"row {number}: {given} images were given, and its text holds {count}")
            kept = (pixels[:count], shapes[:count], tiles[:count])
            rows.append(dict(zip(self.processor_keys, kept, strict=True)))
        return rows

    def tokens(self, row: Processed) -> list[int]:
        """One for each image."""
        return [1] * len(row.get("pixel_values", ()))

    def sizes(self, rows: Sequence[Processed]) -> dict[str, int]:
        """images: at least 1."""
        return {"images": max(sum(len(self.tokens(row)) for row in rows), 1)}

    def image_arrays(self, rows: Sequence[Processed], sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        """pixels float32 [images, tiles, channels, side, side]; shapes int32 [images], the number of the tiles' shape,
        0 for padding; tiles bool [images, tiles], which are part of the image.
        """
        count = self.sizes(rows)["images"]
        if count > sizes["images"]:
            raise ValueError(f"{count} images do not fit into {sizes['images']}")
        pixels = np.zeros((sizes["images"], *self.shape), np.float32)
        shapes, tiles = np.zeros(sizes["images"], np.int32), np.zeros((sizes["images"], self.shape[0]), bool)
        tiles[:, 0] = True  # so that padding sees something
        at = 0
        for row in rows:
            here = slice(at, at + len(self.tokens(row)))
            if here.start < here.stop:
                pixels[here], shapes[here] = row["pixel_values"], row["aspect_ratio_ids"]
                tiles[here] = row["aspect_ratio_mask"] != 0
            at = here.stop
        return {"pixels": pixels, "shapes": shapes, "tiles": tiles}

    def rope_positions(self, input_ids: np.ndarray, row: Processed | None) -> None:
        """Rotary positions are the tokens' numbers."""
        return None
