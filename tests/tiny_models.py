"""Random tiny models of every family, made by transformers: the judges of jaxtune's own models.

Sizes are multiples of 64 (one NF4 block), weights float32, all of them random: norms and biases too.
"""

from pathlib import Path

import torch
import transformers

HIDDEN, FFN, VOCAB, LAYERS = 128, 192, 320, 2
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TIED = {"tie_word_embeddings": True}
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama_tied": ("LlamaConfig", TIED),
    "llama_bias": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral_window": ("MistralConfig", {"sliding_window": 16}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2_window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 64}),
    "qwen3_tied": ("Qwen3Config", TIED),
    "gemma2": (
        "Gemma2Config",
        {
            **TIED,
            "num_hidden_layers": 5,
            "sliding_window": 16,
            "query_pre_attn_scalar": 48,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.0,
        },
    ),
    # two periods of five layers with a window and one without, and a tail of two
    "gemma3": (
        "Gemma3TextConfig",
        {**TIED, "num_hidden_layers": 14, "sliding_window": 16, "query_pre_attn_scalar": 48},
    ),
}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def make_config(family: str, rope: str = "default", **changes) -> transformers.PretrainedConfig:
    """The tiny config of a family with one kind of RoPE; `changes` are fields of config.json."""
    name, fields = FAMILIES[family]
    rope_parameters = {"rope_theta": 10000.0, **ROPES[rope]}
    if family == "gemma3":
        local = {"rope_type": "default", "rope_theta": 500.0}
        rope_parameters = {"full_attention": rope_parameters, "sliding_attention": local}
    fields = {"tie_word_embeddings": False, **SIZES, **fields, "rope_parameters": rope_parameters, **changes}
    return getattr(transformers, name)(**fields)


def make_model(config: transformers.PretrainedConfig, seed: int = 0) -> transformers.PreTrainedModel:
    """transformers' model of `config`, float32, eval mode, every parameter random."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name and "gemma" not in config.model_type else 0.0
            parameter.copy_(mean + 0.08 * torch.randn(parameter.shape))
    return model


def make_tokenizer() -> transformers.PreTrainedTokenizerBase:
    """A byte-level tokenizer (one token a byte) with ChatML's special tokens and template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(specials + letters)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=specials[0],
        eos_token=specials[2],
        pad_token=specials[0],
        chat_template=CHATML,
        model_max_length=256,
    )


def save(model: transformers.PreTrainedModel, folder: Path) -> Path:
    """Model and tokenizer as a Hugging Face folder."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
