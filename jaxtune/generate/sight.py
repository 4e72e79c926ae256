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


@partial(jax.jit, static_argnames="graphdef")
def _placed(graphdef, trainable, base, batch) -> tuple[jax.Array, dict[str, Any]]:
    module = join(graphdef, trainable, base)
    return module.place_images(module.embed(batch["input_ids"]), batch)


def _padded(sizes: dict[str, int]) -> dict[str, int]:
    """Few lengths."""
    return {name: plan.bucket(n, PATCHES if name == "patches" else 1) for name, n in sizes.items()}


class Sight:
    """Looks at the images of some prompts.

    Args:
      model: a `jaxtune.model.Model` with a tower. rows: of each prompt, what the processor gave.
    """

    def __init__(self, model: Any, rows: Sequence[images.Processed]):
        family = images.family(model.config)
        if family is None:
            raise ValueError(f"{model.config.model_type} takes no images")
        self._model, self._rows, self._family = model, rows, family

    def __call__(self, prompts: list[int], ids: np.ndarray, lengths: np.ndarray) -> tuple[Shown, np.ndarray]:
        """Numbers of prompts (fewer than N where some places are empty), ids int32 [N, S] padded at the end and lengths
        int32 [N] -> the prompts with their images, and int32 [N], the offsets of `steps.Prompts`."""
        mask = np.arange(ids.shape[1]) < lengths[:, None]
        rows = [self._rows[prompt] for prompt in prompts] + [{}] * (len(ids) - len(prompts))
        batch = images.batch_arrays(self._family, ids, mask, rows, _padded)
        rope = batch.get("rope_positions")
        offsets = np.zeros_like(lengths) if rope is None else rope.max((1, 2)) + 1 - lengths
        batch = {"input_ids": jnp.asarray(ids), **batch}
        model = self._model
        x, how = _placed(model.graphdef, model.trainable, model.base, batch)
        return Shown(x, how["rope_positions"], how.get("blocks"), how.get("deep")), offsets
