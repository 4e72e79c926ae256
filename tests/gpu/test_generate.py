"""On a Hopper GPU (`pytest -m gpu`): answers from the NF4 codes and an adapter beside those of a merged copy."""

import jax
import numpy as np
import pytest
import tiny_models
from gpu_checks import fresh_seed
from tolerances import BF16_LOGPROBS

from jaxtune.fast import FastLanguageModel
from jaxtune.generate import Engine, Sampling
from jaxtune.kernels import decode_attention, nf4_matmul, target

pytestmark = pytest.mark.gpu


def traced(monkeypatch, module, name: str) -> list:
    """What grows with each call of a kernel that a program being traced makes."""
    calls, function = [], getattr(module, name)
    monkeypatch.setattr(
        module, name, lambda *given, **options: calls.append(0) or function(*given, **options)
    )
    return calls


def test_codes_are_as_near_to_float32_as_a_merged_copy(monkeypatch, tmp_path):
    if target.capability() != (9, 0):
        pytest.skip(f"the kernel is for sm_90, this is {target.capability()}")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    tiny_models.save(tiny_models.make_model(tiny_models.make_config("llama", head_dim=64, **sizes)), tmp_path)

    def load(dtype):
        model, _ = FastLanguageModel.from_pretrained(tmp_path, dtype=dtype, max_seq_length=None)
        return FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8, init_lora_weights=False)

    exact, model = load("float32"), load("bfloat16")
    prompts = np.random.default_rng(fresh_seed()).integers(3, 320, (4, 70)).tolist()
    options = {"sampling": Sampling(do_sample=True), "n": 2, "max_new_tokens": 40, "stop_token_ids": []}
    products, attention = (
        traced(monkeypatch, *kernel) for kernel in ((nf4_matmul, "nf4_matmul"), (decode_attention, "kernel"))
    )
    errors = {}
    for weights in ("merged", "lora"):
        products.clear()
        attention.clear()
        with Engine(model, weights=weights, progress=False) as engine:
            answers = engine.generate(prompts, **options)
            read = [codes for _, codes in engine._loaded]
        assert read == [weights == "lora"]
        assert len(attention) >= 2  # of a layer: with the prompt's cache and with the rows' own
        assert (len(products) >= 4) if weights == "lora" else not products
        ids = np.array([prompts[answer.prompt] + answer.token_ids for answer in answers])
        with jax.default_matmul_precision("highest"):
            logits = exact.logits(ids[:, :-1])[:, -40:]
        found = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), ids[:, -40:, None], 2)[..., 0]
        errors[weights] = np.linalg.norm(np.array([answer.logprobs for answer in answers]) - found)
    assert errors["lora"] <= 2 * errors["merged"], errors
    assert errors["merged"] <= BF16_LOGPROBS * np.sqrt(ids[:, -40:].size), errors
