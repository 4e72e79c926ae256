"""The text model that a vision-language model contains: what its decoder computes on text alone, under the config of a
family of text models."""

from typing import Any, NamedTuple

from jaxtune.formats.text_side import TextSide
from jaxtune.models.decoder import DecoderConfig

_TOKENS = frozenset("bos_token_id eos_token_id pad_token_id dtype".split())


class TextFamily(NamedTuple):
    """The text models among which a vision-language model's decoder is one.

    model_type: theirs. read: the fields of config.json that they honour. path: where the decoder lies in the
    checkpoint. rows_behind: see `TextSide`.
    """

    model_type: str
    read: frozenset[str]
    path: str = "model.language_model"
    rows_behind: int = 0


def text_side(hf, family: TextFamily, decoder: DecoderConfig) -> tuple[Any, TextSide]:
    """The transformers config of the text model, and where it lies in the whole one.

    Args:
      hf: the whole model's config. decoder: that of its decoder, whose layers that see images alone are left out.
    """
    from transformers import AutoConfig  # here because it brings torch where that is installed
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text = hf.text_config
    text.standardize_rope_params()
    known = type(text)().to_dict().keys() & (family.read | _TOKENS)
    fields = {name: value for name, value in text.to_dict().items() if name in known}
    # Of M-RoPE's axes, time, height and width, a text has the same position on each. `type` is rope_type's older name.
    turns = ("type", "mrope_section", "mrope_interleaved")
    rope = {name: value for name, value in fields["rope_parameters"].items() if name not in turns}
    layers = tuple(i for i in range(text.num_hidden_layers) if i not in decoder.cross_layers)
    fields |= {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type]],
        "num_hidden_layers": len(layers),
        "rope_parameters": rope,
        "tie_word_embeddings": decoder.tie_word_embeddings,
    }
    if hasattr(hf, "quantization_config"):
        fields["quantization_config"] = hf.quantization_config
    config = AutoConfig.for_model(family.model_type, **fields)
    return config, TextSide(family.path, layers, family.rows_behind)
