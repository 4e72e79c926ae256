"""A model as what a .gguf file holds: metadata, tensor shapes, and the tensors one at a time.

All that can be refused is refused before the first weight is read. A model that came from a .gguf file keeps
that file's metadata.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import models
from jaxtune.export.adapter import check_finite
from jaxtune.export.gguf_metadata import Metadata, check_config, model_metadata, rope_factors
from jaxtune.export.gguf_origin import kept_metadata, kept_rope_factors
from jaxtune.export.gguf_vocabulary import harmless_name, vocabulary
from jaxtune.export.merged import Base, check_base, merged_on_device, merged_tensor, tensor_shape
from jaxtune.formats.gguf_names import (
    ROPE_FACTORS,
    GgufFamily,
    file_order,
    gguf_name,
    interleave_rotary_halves,
    rotary_heads,
)
from jaxtune.models.names import Slot, expected_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxtune.model import Model

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Conversion:
    """What to write.

    metadata: in the converter's order, general.file_type 0. shapes: GGUF tensor name -> shape, slowest axis
    first, in llama.cpp's order of tensors. layers, heads, kv_heads: of the model. read: name -> float32 tensor of
    that shape, made when called; ValueError for one with NaN or infinity. read_on_device: the same, merged on and left
    on the model's device.
    """

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    metadata: Metadata = field(repr=False)
    shapes: Shapes = field(repr=False)
    read: Callable[[str], np.ndarray] = field(repr=False)
    read_on_device: Callable[[str], jax.Array] = field(repr=False)


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
    family = models.family(config).GGUF
    check_config(config, family)
    decoder = models.family(config).config(config)
    own_factors = rope_factors(decoder.rope)
    factors = own_factors if origin is None else kept_rope_factors(origin, decoder.rope, own_factors)
    plan = {gguf_name(hf): (hf, *place) for hf, place in expected_names(model.module).items()}
    shapes = _shapes(model, plan, family, factors)
    # How many heads the rows of a tensor are, where llama.cpp keeps the two halves of each in turn.
    heads = {
        tensor: rotary_heads(hf, decoder.num_heads, decoder.num_kv_heads) if family.interleaved else None
        for tensor, (hf, *_) in plan.items()
    }
    tokenizer = tokenizer or model.tokenizer
    generation = model.checkpoint.generation_config
    if origin is not None:
        metadata = kept_metadata(origin, config, family, tokenizer, generation, pre_tokenizer)
    else:
        name = name or model.name_or_path.replace("\\", "/").rstrip("/").rpartition("/")[2]
        parameters = sum(int(np.prod(shape)) for shape in shapes.values())
        metadata = model_metadata(config, family, name=name, parameters=parameters, generation=generation)
        metadata["general.name"] = harmless_name(str(metadata["general.name"]), tokenizer)
        metadata |= vocabulary(tokenizer, config, family, generation=generation, pre_tokenizer=pre_tokenizer)

    def read(tensor: str) -> np.ndarray:
        if tensor == ROPE_FACTORS and factors is not None:
            return factors
        values = merged_tensor(model, base, *plan[tensor])
        check_finite(plan[tensor][0], values)
        return interleave_rotary_halves(values, heads[tensor]) if heads[tensor] else values

    def read_on_device(tensor: str) -> jax.Array:
        if tensor == ROPE_FACTORS and factors is not None:
            return jnp.asarray(factors)
        values = merged_on_device(model, base, *plan[tensor])
        if not jnp.isfinite(values).all():
            check_finite(plan[tensor][0], np.asarray(values))
        return interleave_rotary_halves(values, heads[tensor]) if heads[tensor] else values

    return Conversion(
        architecture=family.architecture,
        layers=config.num_hidden_layers,
        heads=decoder.num_heads,
        kv_heads=decoder.num_kv_heads,
        metadata=metadata,
        shapes=shapes,
        read=read,
        read_on_device=read_on_device,
    )


def _shapes(
    model: Model,
    plan: dict[str, tuple[str, Slot, str]],
    family: GgufFamily,
    factors: np.ndarray | None,
) -> Shapes:
    shapes: Shapes = {} if factors is None else {ROPE_FACTORS: factors.shape}
    for name, (_, slot, leaf) in plan.items():
        kind = name.split(".")[-2]
        if leaf == "bias" and kind not in family.biases:
            raise ValueError(
                f"{name}: llama.cpp's {family.architecture} has no bias there and would leave it out"
            )
        shapes[name] = tensor_shape(model, slot, leaf)
    rows = shapes["token_embd.weight"][0]
    if rows != model.config.vocab_size:
        raise ValueError(f"the embedding has {rows} rows and config.vocab_size is {model.config.vocab_size}")
    return {name: shapes[name] for name in file_order(shapes)}
