"""Model families. To add one:

1. One file here with `READ`, the config.json fields it honours, `GGUF`, how llama.cpp knows the family, and
   `config(hf)`, which maps them to the decoder's through `read_config` (or, for another architecture, a module of its
   own whose attribute paths are the checkpoint's names).
2. One line in FAMILIES.
3. One parity test: an entry in tests/models/test_parity.py, whose judge is transformers; and for GGUF one in FAMILIES
   of tests/export/test_gguf_conversion.py, whose judge is llama.cpp.
"""

from types import ModuleType

import jax.numpy as jnp

from jaxtune.models import gemma2, gemma3, llama, mistral, qwen2, qwen3
from jaxtune.models.decoder import CausalLM
from jaxtune.models.names import linear_slots, module_at
from jaxtune.quant import check_quantisable

FAMILIES: dict[str, ModuleType] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
}

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
        raise ValueError(
            f"auto_map={hf.auto_map} asks for the repository's own code; jaxtune runs no remote code"
        )
    read = family(hf).READ | HARMLESS
    defaults = type(hf)().to_dict()
    for name, value in hf.to_dict().items():
        if name in defaults and name not in read and value != defaults[name]:
            raise ValueError(
                f"config.json has {name}={value!r}, which jaxtune's {hf.model_type} does not support "
                f"(only {defaults[name]!r})"
            )


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
      nf4: store the linear layers of the decoder (not the head) in NF4, their scales quantised if `double_quant`.
      dense: names of linear modules that are not quantised all the same.
      fp8: multiply by the NF4 weights in 8-bit floats (kernels.fp8).
    """
    check_fields(hf)
    config = family(hf).config(hf)
    skipped = [
        frozenset(n.split(".", 3)[3] for n in dense if n.startswith(f"model.layers.{i}."))
        for i in range(len(config.windows))
    ]
    model = CausalLM(config, dtype, skipped if nf4 else None)
    model.fp8 = fp8
    if nf4:
        for name, slot in linear_slots(model).items():
            if name != "lm_head" and name not in dense:
                linear = module_at(model, slot.path)
                check_quantisable((linear.out_features, linear.in_features), name)
                linear.quantize(double_quant, fp8)
    return model
