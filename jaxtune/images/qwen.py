"""Qwen2.5-VL's and Qwen3-VL's images on the host: patches packed end to end, windows, and M-RoPE positions.

The processor cuts an image of h by w patches into rows of pixels, ordered so that the m x m patches that are merged
into one token stand together. All images of a micro-batch become one run of patches; who sees whom is said by
segments. (Qwen2.5-VL: arXiv 2502.13923, §2.1; M-RoPE: Qwen2-VL, arXiv 2409.12191, §2.1.)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Processed = Mapping[str, np.ndarray]


def patch_positions(height: int, width: int, merge: int) -> np.ndarray:
    """int32 [height·width, 2], (row, column) of each patch of an image in the processor's order."""
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1)
    blocks = grid.reshape(height // merge, merge, width // merge, merge, 2).swapaxes(1, 2)
    return blocks.reshape(-1, 2).astype(np.int32)


def window_order(height: int, width: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The order in which the tokens of an image come window by window.

    Args:
      height, width: of the image in tokens (merged patches). side: of a window, in tokens.

    Returns:
      order int [height·width], numbers of the tokens; lengths int [windows], tokens of each window, none empty.
    """
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    window = (rows // side) * -(-width // side) + columns // side
    order = np.argsort(window.reshape(-1), kind="stable")
    return order, np.bincount(window.reshape(-1))


def interpolation(height: int, width: int, side: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """How a learned table of side x side positions is stretched over an image, corners on corners, bilinear.

    Returns:
      indices int32 [height·width, 4] into the flattened table and weights float32 of the same shape, in the
      processor's order of patches.
    """

    def axis(index: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        at = index.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
        low = np.floor(at)
        taps = np.clip(low.astype(np.int32)[:, None] + np.arange(2, dtype=np.int32), 0, side - 1)
        return taps, np.stack([1 - (at - low), at - low], -1)

    place = patch_positions(height, width, merge)
    rows, row_weights = axis(place[:, 0], height)
    columns, column_weights = axis(place[:, 1], width)
    indices = rows[:, :, None] * side + columns[:, None, :]
    weights = row_weights[:, :, None] * column_weights[:, None, :]
    return indices.reshape(-1, 4), weights.reshape(-1, 4).astype(np.float32)


class QwenImages:
    """What the two families share; see `images.VisionFamily`."""

    processor_keys: tuple[str, ...] = ("pixel_values", "image_grid_thw")

    def __init__(self, config: Any):
        vision = config.vision_config
        self.image_token_id = config.image_token_id
        self.placeholder_ids = frozenset(
            (
                config.image_token_id,
                config.video_token_id,
                config.vision_start_token_id,
                config.vision_end_token_id,
            )
        )
        self.merge = vision.spatial_merge_size
        self.patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2

    def rows(self, processed: Processed, input_ids: Sequence[np.ndarray]) -> list[Processed]:
        """Images are counted by the tokens they take."""
        lengths, grids = (
            self.tokens(processed),
            np.asarray(processed.get("image_grid_thw", ())).reshape(-1, 3),
        )
        pixels = processed.get("pixel_values", np.zeros((0, self.patch_dim), np.float32))
        rows: list[Processed] = []
        at, patch = 0, 0
        for number, ids in enumerate(input_ids):
            missing, first = int(np.sum(np.asarray(ids) == self.image_token_id)), at
            while missing > 0 and at < len(lengths):
                missing -= lengths[at]
                at += 1
            if missing:
                raise ValueError(
                    f"row {number}: its text's image tokens are not those of whole images; {missing} too many"
                )
            count = sum(lengths[first:at]) * self.merge**2
            rows.append({"pixel_values": pixels[patch : patch + count], "image_grid_thw": grids[first:at]})
            patch += count
        if at < len(lengths):
            raise ValueError(
                f"{len(lengths)} images were given, and the texts hold {at}; give each one a placeholder"
            )
        return rows

    def tokens(self, row: Processed) -> list[int]:
        """h·w/m² of each image."""
        return [h * w // self.merge**2 for h, w in _grids([row])]

    def sizes(self, rows: Sequence[Processed]) -> dict[str, int]:
        """patches: a multiple of m². images: at least 1."""
        grids = _grids(rows)
        patches = sum(h * w for h, w in grids)
        return {"patches": max(patches, self.merge**2), "images": max(len(grids), 1)}

    def image_arrays(self, rows: Sequence[Processed], sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        """pixels float32 [P, 3·2·p²]; positions int32 [P, 2], row and column of a patch in its image; segments int32
        [P], images counted from 1, 0 for padding; starts int32 [images + 1], first patch of each image and of the
        padding, -1 where there is none.
        """
        self._check(rows, sizes)
        grids, patches = _grids(rows), sizes["patches"]
        pixels = np.zeros((patches, self.patch_dim), np.float32)
        positions, segments = np.zeros((patches, 2), np.int32), np.zeros(patches, np.int32)
        starts = np.full(sizes["images"] + 1, -1, np.int32)
        at = 0
        for row in rows:
            values = np.asarray(row.get("pixel_values", pixels[:0]), np.float32)
            pixels[at : at + len(values)] = values
            at += len(values)
        at = 0
        for number, (h, w) in enumerate(grids):
            here = slice(at, at + h * w)
            positions[here], segments[here], starts[number] = (
                patch_positions(h, w, self.merge),
                number + 1,
                at,
            )
            at += h * w
        if at < patches:
            starts[len(grids)] = at
        return {"pixels": pixels, "positions": positions, "segments": segments, "starts": starts}

    def rope_positions(self, input_ids: np.ndarray, row: Processed | None) -> np.ndarray:
        """Text counts up on all three axes; an image's tokens have its rows and columns, and what follows it goes on
        after the longer side."""
        is_image = np.asarray(input_ids) == self.image_token_id
        positions = np.zeros((len(is_image), 3), np.int32)
        at, following = 0, 0
        for h, w in [] if row is None else _grids([row]):
            found = np.flatnonzero(is_image[at:])
            if not found.size:
                raise ValueError(f"the row has fewer images in its text than in {self.processor_keys[1]}")
            h, w = h // self.merge, w // self.merge
            first = at + found[0]
            positions[at:first] = following + np.arange(first - at)[:, None]
            following += first - at
            rows, columns = np.divmod(np.arange(h * w), w)
            positions[first : first + h * w] = following + np.stack([0 * rows, rows, columns], -1)
            following += max(h, w)
            at = first + h * w
        positions[at:] = following + np.arange(len(is_image) - at)[:, None]
        return positions

    def _check(self, rows: Sequence[Processed], sizes: Mapping[str, int]) -> None:
        need = self.sizes(rows)
        short = {
            name: (count, sizes.get(name, 0)) for name, count in need.items() if sizes.get(name, 0) < count
        }
        if short:
            text = ", ".join(
                f"{name}: {count} needed, {given} given" for name, (count, given) in short.items()
            )
            raise ValueError(
                f"the images do not fit ({text}); take fewer images in a micro-batch, or larger sizes"
            )
        if sizes["patches"] % self.merge**2:
            raise ValueError(f"patches must be a multiple of {self.merge**2}, got {sizes['patches']}")


class Qwen2_5VLImages(QwenImages):
    """Most layers of this tower attend within windows: patches come window by window, and their tokens are put back
    into the order of the text by `restore`."""

    def __init__(self, config: Any):
        super().__init__(config)
        vision = config.vision_config
        self.window_side = vision.window_size // vision.spatial_merge_size // vision.patch_size  # in tokens

    def sizes(self, rows: Sequence[Processed]) -> dict[str, int]:
        """windows beside those of `QwenImages`."""
        side = self.window_side * self.merge
        count = sum(-(-h // side) * -(-w // side) for h, w in _grids(rows))
        return super().sizes(rows) | {"windows": max(count, 1)}

    def image_arrays(self, rows: Sequence[Processed], sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        """Those of `QwenImages`, patches in the order of windows; windows int32 [windows, S], the patches of each
        window, -1 where it has fewer than S = (window side in patches)²; places int32 [P], where in that (flattened)
        each patch stands, padding beyond its end; restore int32 [P/m²], for each token in the order of the text its
        number in that of windows.
        """
        arrays = super().image_arrays(rows, sizes)
        unit, patches = self.merge**2, sizes["patches"]
        order, lengths = np.arange(patches // unit), []
        at = 0
        for h, w in _grids(rows):
            h, w = h // self.merge, w // self.merge
            own, counts = window_order(h, w, self.window_side)
            order[at : at + h * w] = at + own
            lengths.extend(counts.tolist())
            at += h * w
        by_patch = (order[:, None] * unit + np.arange(unit)).reshape(-1)
        for name in ("pixels", "positions"):
            arrays[name] = arrays[name][by_patch]
        width = self.window_side**2 * unit
        inside = np.array(lengths, np.int64) * unit
        number = np.repeat(np.arange(len(inside)), inside)
        places = number * width + np.arange(len(number)) - np.repeat(np.cumsum(inside) - inside, inside)
        windows = np.full(sizes["windows"] * width, -1, np.int32)
        windows[places] = np.arange(len(places))
        arrays["windows"] = windows.reshape(-1, width)
        arrays["places"] = windows.size + np.arange(patches, dtype=np.int32)
        arrays["places"][: len(places)] = places
        arrays["restore"] = np.argsort(order).astype(np.int32)
        return arrays


class Qwen3VLImages(QwenImages):
    """Adds a learned table of positions, stretched over each image."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.table_side = int(config.vision_config.num_position_embeddings**0.5)

    def image_arrays(self, rows: Sequence[Processed], sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        """Those of `QwenImages`; table_rows int32 [P, 4] and table_weights float32 [P, 4] of the learned positions."""
        arrays = super().image_arrays(rows, sizes)
        indices = np.zeros((sizes["patches"], 4), np.int32)
        weights = np.zeros((sizes["patches"], 4), np.float32)
        at = 0
        for h, w in _grids(rows):
            here = slice(at, at + h * w)
            indices[here], weights[here] = interpolation(h, w, self.table_side, self.merge)
            at += h * w
        return arrays | {"table_rows": indices, "table_weights": weights}


def _grids(rows: Sequence[Processed]) -> list[tuple[int, int]]:
    """(height, width) in patches of all images of some rows."""
    found = [
        tuple(map(int, grid))
        for row in rows
        for grid in np.asarray(row.get("image_grid_thw", ())).reshape(-1, 3)
    ]
    if any(t != 1 for t, _, _ in found):
        raise ValueError(
            f"videos are not supported: an image_grid_thw has {max(t for t, _, _ in found)} frames"
        )
    return [(h, w) for _, h, w in found]
