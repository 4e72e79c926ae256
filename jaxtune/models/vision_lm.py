"""A decoder that sees: image features from a tower stand in the place of image tokens' embeddings.

A family gives the body, a module with the decoder and the tower under the checkpoint's names, whose `features` turns
the arrays of `images.VisionFamily.image_arrays` into rows [F, D]. Rows of text alone run as those of a `CausalLM`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxtune.kernels.attention import rows
from jaxtune.models.decoder import CausalLM, Decoder, DecoderConfig, Deep, Segment
from jaxtune.models.layers import Linear
from jaxtune.models.remat import Remat

# (path of a list of layers, how many) -> of each the names in it that stay unquantised where others are quantised.
Dense = Callable[[str, int], list[frozenset[str]]]


class Body(Protocol):
    """The module `model` of a checkpoint: a decoder, a tower, and what stands between them."""

    def features(
        self, images: dict[str, jax.Array], *, key: jax.Array | None, remat: Remat | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Rows [F, D] of all images, each image's tokens in the order of the text; and of families that have them
        those for the first layers, [n, F, D] (`decoder.Deep`)."""
        ...


class VisionLM(CausalLM):
    """A language model with a tower.

    Args:
      config: of the decoder. body: holds the decoder under the name `decoder`. plan: the decoder's segments.
      stacks: (path below `model`, plan) of the tower's lists of layers.
    """

    def __init__(
        self,
        config: DecoderConfig,
        body: Any,
        dtype,
        plan: tuple[Segment, ...],
        *,
        decoder: str = "language_model",
        stacks: Sequence[tuple[str, tuple[Segment, ...]]] = (),
    ):
        self.model, self._decoder_name = body, decoder
        self.decoder_path, self.plan = f"model.{decoder}", plan
        self.stacks = (
            *((f"model.{path}", tower) for path, tower in stacks),
            (f"{self.decoder_path}.layers", plan),
        )
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
        self.config, self.dtype = config, dtype

    @property
    def decoder(self) -> Decoder:
        return getattr(self.model, self._decoder_name)

    def place_images(
        self, x: jax.Array, batch: dict[str, Any], *, key: jax.Array | None = None, remat: Remat | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """See CausalLM.

        Args:
          batch: image_slots int32 [B, T], the feature row that stands at a token, -1 at text, no row at two tokens (its
            gradient would be one of theirs); images, the family's arrays; where the family has them, rope_positions
            int32 [B, T, 3]. Without images it is text.
        """
        how: dict[str, Any] = {"rope_positions": batch.get("rope_positions")}
        if "images" not in batch:
            return x, how
        slots, each = batch["image_slots"], self.config.whole_image_tokens
        if each is not None:
            how["blocks"] = jnp.where(slots >= 0, slots // each + 1, 0)
        with jax.named_scope("tower"):
            features, deep = self.model.features(batch["images"], key=key, remat=remat)
        if deep is not None:
            how["deep"] = Deep(deep, slots)
        return jnp.where(slots[..., None] >= 0, rows(features, slots).astype(x.dtype), x), how
