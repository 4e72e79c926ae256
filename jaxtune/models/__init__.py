"""Model families. To add one:

1. One file here with `READ`, the config.json fields it honours, `GGUF`, how llama.cpp knows the family, and
   `config(hf)`, which maps them to the decoder's through `read_config`. For a model that is more than a decoder also
   `module(hf, dtype, dense)`, whose attribute paths are the checkpoint's names, `PARTS`, the fields of the nested
   configs that it honours, `TEXT`, the text models of which its decoder is one, and where published checkpoints have
   other names, `RENAMES`. Its images: `jaxtune.images`.
2. One line in FAMILIES.
3. One parity test: an entry in tests/models/test_parity.py, whose judge is transformers; and for GGUF one in FAMILIES
   of tests/export/test_gguf_conversion.py, whose judge is llama.cpp.
"""

from types import ModuleType
from typing import Any

import jax.numpy as jnp

from jaxtune.formats.text_side import TextSide
from jaxtune.models import (
    gemma2,
    gemma3,
    gemma3_vision,
    idefics3,
    llama,
    mistral,
    mllama,
    qwen2,
    qwen2_5_vl,
    qwen3,
    qwen3_vl,
    text_side,
)
from jaxtune.models.decoder import CausalLM
from jaxtune.models.layers import Linear
from jaxtune.models.names import linear_slots, module_at
from jaxtune.quant import BLOCK, check_quantisable

FAMILIES: dict[str, ModuleType] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "gemma3": gemma3_vision,
    "idefics3": idefics3,
    "smolvlm": idefics3,
    "mllama": mllama,
}

# Parts of a module's name that keep it in 16 bits where others are quantised, as Unsloth has them: the head, and what
# stands between tower and decoder.
IN_16_BITS = frozenset(
    """lm_head multi_modal_projector merger modality_projection router audio_tower vision_tower vision_embedder
    embed_vision embed_audio score classifier qa_outputs""".split()
)

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


def renames(hf) -> tuple[tuple[str, str], ...]:
    """How a published checkpoint's names become those here: (pattern, replacement) pairs; see `formats.Renamed`."""
    return getattr(family(hf), "RENAMES", ())


def text_side_of(hf) -> tuple[Any, TextSide] | None:
    """The config of the text model in a vision-language model, and where it lies there; None for a text model.

    Raises:
      ValueError: a field that changes what it computes and is not supported.
    """
    module = family(hf)
    if not hasattr(module, "TEXT"):
        return None
    _check_part(hf, module.READ, "", hf.model_type)
    _check_part(hf.text_config, module.PARTS["text_config"], "text_config.", hf.model_type)
    return text_side.text_side(hf, module.TEXT, module.config(hf))


def check_fields(hf) -> None:
    """Raises ValueError for a config field that transformers honours, that differs from its default, and that this
    family does not read. Fields unknown to transformers have no effect there and none here."""
    if getattr(hf, "auto_map", None):
        raise ValueError(
            f"auto_map={hf.auto_map} asks for the repository's own code; jaxtune runs no remote code"
        )
    module = family(hf)
    _check_part(hf, module.READ, "", hf.model_type)
    for part, read in getattr(module, "PARTS", {}).items():
        _check_part(getattr(hf, part), read, f"{part}.", hf.model_type)


def _check_part(hf, read: frozenset[str], where: str, model_type: str) -> None:
    defaults = type(hf)().to_dict()
    for name, value in hf.to_dict().items():
        if name in defaults and name not in read | HARMLESS and value != defaults[name]:
            raise ValueError(
                f"config.json has {where}{name}={value!r}, which jaxtune's {model_type} does not support "
                f"(only {defaults[name]!r})"
            )


def stays_in_16_bits(model: CausalLM, name: str, linear: Linear) -> bool:
    """Whether a linear module is not to be quantised: by IN_16_BITS, or one of a tower whose rows are no whole blocks
    of NF4 (bitsandbytes counts blocks across rows)."""
    if IN_16_BITS & set(name.split(".")):
        return True
    return not name.startswith(f"{model.decoder_path}.") and linear.in_features % BLOCK != 0


def build(
    hf,
    dtype=jnp.bfloat16,
    *,
    nf4: bool = False,
    double_quant: bool = True,
    dense: frozenset[str] = frozenset(),
    fp8: bool = False,
):
    """The CausalLM of a transformers config, its leaves shapes only; nothing is allocated.

    Args:
      hf: transformers config of a family in FAMILIES.
      dtype: of the activations and of the weights that are not quantised.
      nf4: store the linear layers (but for `stays_in_16_bits`) in NF4, their scales quantised if `double_quant`.
      dense: names of linear modules that are not quantised all the same.
      fp8: multiply by the decoder's NF4 weights in 8-bit floats (kernels.fp8).
    """
    check_fields(hf)

    def plain(stack: str, count: int) -> list[frozenset[str]]:
        """Of each layer of a stack, the names in it that `dense` holds."""
        inside = [f"{stack}.{i}." for i in range(count)]
        found = dense if nf4 else frozenset()
        return [frozenset(n.removeprefix(at) for n in found if n.startswith(at)) for at in inside]

    module = family(hf)
    if hasattr(module, "module"):
        model = module.module(hf, dtype, plain)
    else:
        config = module.config(hf)
        model = CausalLM(config, dtype, plain("model.layers", len(config.windows)))
    model.fp8 = fp8
    if nf4:
        for name, slot in linear_slots(model).items():
            linear = module_at(model, slot.path)
            if name not in dense and not stays_in_16_bits(model, name, linear):
                check_quantisable((linear.out_features, linear.in_features), name)
                linear.quantize(double_quant, fp8 and name.startswith(f"{model.decoder_path}."))
    return model
