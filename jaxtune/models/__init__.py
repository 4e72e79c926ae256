"""Model families. To add one:

1. One file here with `READ`, the config.json fields it honours, and `config(hf)`, which maps them to the decoder's
   (or, for another architecture, a module of its own whose attribute paths are the checkpoint's names).
2. One line in FAMILIES.
3. One parity test: an entry in tests/models/test_parity.py, whose judge is transformers.
"""

from types import ModuleType

import jax.numpy as jnp

from jaxtune.models import llama, mistral, qwen2, qwen3
from jaxtune.models.decoder import CausalLM

FAMILIES: dict[str, ModuleType] = {"llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3}

# Fields of a transformers config that leave the mathematics of training and generation as they are.
HARMLESS = {
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "model_type",
    "pad_token_id",
    "pretraining_tp",
    "quantization_config",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "_name_or_path",
    "name_or_path",
    "id2label",
    "label2id",
    "problem_type",
}


def family(hf) -> ModuleType:
    """The module of a config's model_type; raises ValueError naming what exists."""
    if hf.model_type not in FAMILIES:
        raise ValueError(f"model_type={hf.model_type!r} is not supported; jaxtune has {', '.join(FAMILIES)}")
    return FAMILIES[hf.model_type]


def check_fields(hf) -> None:
    """Raises ValueError for a config field that transformers honours, that differs from its default, and that this
    family does not read. Fields unknown to transformers have no effect there and none here."""
    if getattr(hf, "auto_map", None):
        raise ValueError(f"auto_map={hf.auto_map} asks for the repository's own code; jaxtune runs no remote code")
    read = family(hf).READ | HARMLESS
    defaults = type(hf)().to_dict()
    for name, value in hf.to_dict().items():
        if name in defaults and name not in read and value != defaults[name]:
            raise ValueError(
                f"config.json has {name}={value!r}, which jaxtune's {hf.model_type} does not support "
                f"(only {defaults[name]!r})"
            )


def build(hf, dtype=jnp.bfloat16) -> CausalLM:
    """The model of a transformers config, its leaves shapes only; nothing is allocated."""
    check_fields(hf)
    return CausalLM(family(hf).config(hf), dtype)
