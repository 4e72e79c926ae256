"""Prompts with images: the tower runs once for each of them, before prefill."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import images
from jaxtune.generate import plan
from jaxtune.generate.steps import Shown
from jaxtune.models.names import join

PATCHES = 64  # the smallest number of patches that the tower runs on


@partial(jax.jit, static_argnames=("graphdef", "unread"))
def _placed(graphdef, leaves, batch, unread) -> tuple[jax.Array, dict[str, Any]]:
    module = join(graphdef, leaves, dict(unread))
    return module.place_images(module.embed(batch["input_ids"]), batch)


def _padded(sizes: dict[str, int]) -> dict[str, int]:
    """Few lengths."""
    return {name: plan.bucket(n, PATCHES if name == "patches" else 1) for name, n in sizes.items()}


class Sight:
    """Looks at the images of some prompts.

    Args:
      model: a `jaxtune.model.Model` with a tower. rows: of each prompt, what the processor gave.
      device: which of its layout's own devices looks.
    """

    def __init__(self, model: Any, rows: Sequence[images.Processed], device: int = 0):
        family = images.family(model.config)
        if family is None:
            raise ValueError(f"{model.config.model_type} takes no images")
        self._graphdef, self._rows, self._family = model.graphdef, rows, family
        layers, leaves = f"{model.module.decoder_path}.layers.", {**model.base, **model.trainable}
        read = {path: leaf for path, leaf in leaves.items() if not path.startswith(layers)}
        self._leaves = model.layout.on_one_device(read, device)
        self._unread = tuple(
            (path, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
            for path, leaf in leaves.items()
            if path not in read
        )
        most = max((len(family.tokens(row)) for row in rows), default=0)
        seen = most * model.module.config.cross_tokens
        # of the caches of layers that attend to images, if there are any
        self.columns = -(-seen // plan.PROMPT_COLUMNS) * plan.PROMPT_COLUMNS

    def __call__(
        self, prompts: list[int], ids: np.ndarray, lengths: np.ndarray
    ) -> tuple[Shown, np.ndarray, np.ndarray]:
        """Numbers of prompts (fewer than N where some places are empty), ids int32 [N, S] padded at the end and lengths
        int32 [N] -> the prompts with their images, and int32 [N] each, offsets and seen of `steps.Prompts`."""
        mask = np.arange(ids.shape[1]) < lengths[:, None]
        rows = [self._rows[prompt] for prompt in prompts] + [{}] * (len(ids) - len(prompts))
        batch = images.batch_arrays(self._family, ids, mask, rows, _padded)
        rope = batch.get("rope_positions")
        offsets = np.zeros_like(lengths) if rope is None else rope.max((1, 2)) + 1 - lengths
        batch = {"input_ids": jnp.asarray(ids), "segment_ids": jnp.asarray(mask, jnp.int32), **batch}
        x, how = _placed(self._graphdef, self._leaves, batch, self._unread)
        shown = Shown(x, how.get("rope_positions"), how.get("blocks"), how.get("deep"), how.get("cross"))
        seen = np.zeros_like(lengths)
        if shown.cross is not None:
            last = shown.cross.seen[jnp.arange(len(ids)), lengths - 1]
            seen = np.asarray(last.sum((1, 2)), np.int32)
        return shown, offsets, seen
