"""A model as what a .gguf file holds: metadata, tensor shapes, and the tensors one at a time.

All that can be refused is refused before the first weight is read. A model that came from a .gguf file keeps
that file's metadata.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import models
from jaxtune.export.adapter import check_finite
from jaxtune.export.gguf_metadata import Metadata, check_config, gguf_family, model_metadata, rope_factors
from jaxtune.export.gguf_origin import kept_metadata, kept_rope_factors
from jaxtune.export.gguf_vocabulary import harmless_name, vocabulary
from jaxtune.export.merged import Base, check_base, merged_on_device, merged_tensor, tensor_shape
from jaxtune.formats.gguf_names import (
    ROPE_FACTORS,
    GgufFamily,
    file_order,
    gguf_name,
    interleave_rotary_halves,
    norm_shift,
    rotary_heads,
)
from jaxtune.models.names import Slot, expected_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxtune.model import Model

Shapes = dict[str, tuple[int, ...]]


class _Place(NamedTuple):
    """Where a tensor comes from: checkpoint name, slot and leaf; how many heads its rows are, if llama.cpp keeps the
    two halves of each in turn; and what is added to it."""

    name: str
    slot: Slot
    leaf: str
    heads: int | None
    shift: float

    def stored(self, values):
        """Values of NumPy or JAX as the file has them."""
        values = values + np.float32(self.shift) if self.shift else values
        return interleave_rotary_halves(values, self.heads) if self.heads else values


@dataclass(frozen=True)
class Conversion:
    """What to write.

    metadata: in the converter's order, general.file_type 0. shapes: GGUF tensor name -> shape, slowest axis
    first, in llama.cpp's order of tensors. layers, heads, kv_heads: of the model.
    """

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    metadata: Metadata = field(repr=False)
    shapes: Shapes = field(repr=False)
    _model: Model = field(repr=False)
    _base: Base = field(repr=False)
    _places: dict[str, _Place] = field(repr=False)
    _factors: np.ndarray | None = field(repr=False)

    def read(self, tensor: str) -> np.ndarray:
        """One tensor as it goes into the file, float32, merged now; ValueError for one with NaN or infinity."""
        if tensor == ROPE_FACTORS and self._factors is not None:
            return self._factors
        place = self._places[tensor]
        values = merged_tensor(self._model, self._base, place.name, place.slot, place.leaf)
        check_finite(place.name, values)
        return place.stored(values)

    def read_on_device(self, tensor: str) -> jax.Array:
        """The same, merged on and left on the model's device."""
        if tensor == ROPE_FACTORS and self._factors is not None:
            return jnp.asarray(self._factors)
        place = self._places[tensor]
        values = merged_on_device(self._model, self._base, place.name, place.slot, place.leaf)
        if not jnp.isfinite(values).all():
            check_finite(place.name, np.asarray(values))
        return place.stored(values)


def convert(
    model: Model,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    base: Base = "dequantised",
    name: str | None = None,
    pre_tokenizer: str | None = None,
) -> Conversion:
    """A model with its adapter merged in, ready to be written as GGUF.

    Args:
        model: any model jaxtune loads or has trained.
        tokenizer: by default the model's.
        base: what an adapter is merged onto; see export.merged.
        name: for general.name and its kin; by default the last part of the model's path or hub id.
        pre_tokenizer: llama.cpp's name of the tokenizer's pre-tokenizer, for rules that jaxtune does not know.

    Raises:
        ValueError: something in config, tokenizer or shapes that GGUF or llama.cpp cannot say; it is named.
    """
    check_base(model, base)
    config, origin = model.config, model.checkpoint.gguf
    family, decoder = gguf_family(config), models.family(config).config(config)
    check_config(config, family)
    factors = rope_factors(decoder.rope)
    if origin is not None:
        factors = kept_rope_factors(origin, decoder.rope, factors)
    inside = f"{model.module.decoder_path}."
    places = {
        gguf_name(hf.replace(inside, "model.", 1), family.architecture): _Place(
            hf,
            *place,
            rotary_heads(hf, decoder.num_heads, decoder.num_kv_heads) if family.interleaved else None,
            norm_shift(hf, family.architecture),
        )
        for hf, place in expected_names(model.module).items()
        if hf.startswith((inside, "lm_head."))
    }
    shapes = _shapes(model, places, family, factors)
    metadata = _metadata(model, tokenizer or model.tokenizer, shapes, name, pre_tokenizer)
    return Conversion(
        family.architecture,
        len(decoder.windows),
        decoder.num_heads,
        decoder.num_kv_heads,
        metadata,
        shapes,
        model,
        base,
        places,
        factors,
    )


def _metadata(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    shapes: Shapes,
    name: str | None,
    pre_tokenizer: str | None,
) -> Metadata:
    config, origin, generation = model.config, model.checkpoint.gguf, model.checkpoint.generation_config
    family = gguf_family(config)
    if origin is not None:
        return kept_metadata(origin, config, family, tokenizer, generation, pre_tokenizer)
    name = name or model.name_or_path.replace("\\", "/").rstrip("/").rpartition("/")[2]
    parameters = sum(int(np.prod(shape)) for shape in shapes.values())
    keys = model_metadata(config, family, name=name, parameters=parameters, generation=generation)
    keys["general.name"] = harmless_name(str(keys["general.name"]), tokenizer)
    return keys | vocabulary(tokenizer, config, family, generation=generation, pre_tokenizer=pre_tokenizer)


def _shapes(
    model: Model,
    places: dict[str, _Place],
    family: GgufFamily,
    factors: np.ndarray | None,
) -> Shapes:
    shapes: Shapes = {} if factors is None else {ROPE_FACTORS: factors.shape}
    for name, place in places.items():
        kind, leaf = name.split(".")[-2], place.leaf
        if leaf == "bias" and kind not in family.biases:
            raise ValueError(
                f"{name}: llama.cpp's {family.architecture} has no bias there and would leave it out"
            )
        shapes[name] = tensor_shape(model, place.slot, leaf)
    rows, wanted = shapes["token_embd.weight"][0], model.config.get_text_config().vocab_size
    if rows != wanted:
        raise ValueError(f"the embedding has {rows} rows and config.vocab_size is {wanted}")
    return {name: shapes[name] for name in file_order(shapes)}
