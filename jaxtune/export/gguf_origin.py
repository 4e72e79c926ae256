"""Metadata of a model that came from a .gguf file: the file's own keys, changed where the model has changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtune import models
from jaxtune.export.gguf_metadata import Metadata, hyperparameters, rope_scaling
from jaxtune.export.gguf_special_tokens import further_ends
from jaxtune.export.gguf_vocabulary import vocabulary
from jaxtune.formats.gguf_names import GgufFamily
from jaxtune.formats.gguf_reader import GgufModel
from jaxtune.models.rope import Rope, from_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# Keys that told how the old file was made.
_NOT_KEPT = ("quantize.", "split.")


def kept_metadata(
    origin: GgufModel,
    config: PretrainedConfig,
    family: GgufFamily,
    tokenizer: PreTrainedTokenizerBase,
    generation: Mapping[str, Any],
    pre_tokenizer: str | None,
) -> Metadata:
    """The origin's metadata for a model that may have been given another context, tokenizer or chat template.

    Args and errors as in gguf_vocabulary.vocabulary.
    """
    keys = {key: value for key, value in origin.typed_metadata().items() if not key.startswith(_NOT_KEPT)}
    _change_hyperparameters(keys, origin, config, family)
    if _same_tokens(tokenizer, keys):
        _change_tokenizer(keys, tokenizer, generation)
    else:
        keys = {key: value for key, value in keys.items() if not key.startswith("tokenizer.")}
        keys |= vocabulary(
            tokenizer, config, family, generation=dict(generation), pre_tokenizer=pre_tokenizer
        )
    return keys | {"general.file_type": np.uint32(0)}


def kept_rope_factors(origin: GgufModel, rope: Rope, factors: np.ndarray | None) -> np.ndarray | None:
    """The origin's own divisors while the scaling is the one that was read from them, else `factors`."""
    return origin.rope_factors if _origin_rope(origin).scaling == rope.scaling else factors


def _origin_rope(origin: GgufModel) -> Rope:
    from transformers import AutoConfig

    return from_config(AutoConfig.for_model(**origin.config))


def _change_hyperparameters(
    keys: Metadata, origin: GgufModel, config: PretrainedConfig, family: GgufFamily
) -> None:
    prefix = f"{family.architecture}."
    rope = models.family(config).config(config).rope
    if rope_scaling(rope) != rope_scaling(_origin_rope(origin)):
        for key in [
            key for key in keys if key.startswith((f"{prefix}rope.scaling.", f"{prefix}rope.scale_"))
        ]:
            del keys[key]
        keys |= {prefix + key: value for key, value in rope_scaling(rope).items()}
    for key, value in hyperparameters(config).items():
        if prefix + key in keys and not np.all(keys[prefix + key] == value):
            keys[prefix + key] = value


def _same_tokens(tokenizer: PreTrainedTokenizerBase, keys: Metadata) -> bool:
    tokens = keys["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    vocab = tokenizer.get_vocab()
    return all(i < len(tokens) and tokens[i] in (text, text.replace("▁", " ")) for text, i in vocab.items())


def _change_tokenizer(
    keys: Metadata, tokenizer: PreTrainedTokenizerBase, generation: Mapping[str, Any]
) -> None:
    """What training may change without touching the vocabulary: the end of a text and the chat template."""
    if tokenizer.eos_token_id is not None:
        keys["tokenizer.ggml.eos_token_id"] = np.uint32(tokenizer.eos_token_id)
    template = tokenizer.chat_template
    if isinstance(template, str) and template != keys.get("tokenizer.chat_template"):
        keys["tokenizer.chat_template"] = template
        ids = {"eos": tokenizer.eos_token_id}
        keys |= further_ends(tokenizer, ids, generation)
