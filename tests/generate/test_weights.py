"""Both forms of the weights for every kind of layer: DoRA, partly adapted layers, biases, trained heads and weights."""

import jax
import numpy as np
import pytest
from tolerances import SAMPLED_LOGPROBS

from jaxtune.fast import FastLanguageModel
from jaxtune.generate import Engine
from jaxtune.generate.weights import merged, merged_bytes, step_bytes, stored
from jaxtune.kernels.nf4_matmul import fold

pytestmark = pytest.mark.usefixtures("quick_compilation")

KINDS = {
    "dora": (
        "qwen2",
        {},
        {"use_dora": True, "layers_to_transform": [1], "target_modules": ["q_proj", "v_proj", "down_proj"]},
    ),
    "bias, head": ("llama_bias", {"load_in_16bit": True}, {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "whole": ("qwen3_tied", {"full_finetuning": True}, None),
}


@pytest.fixture(scope="module", params=KINDS)
def model(request, tiny_model_dir):
    family, loading, adapter = KINDS[request.param]
    model, _ = FastLanguageModel.from_pretrained(
        tiny_model_dir(family), dtype="float32", max_seq_length=None, **loading
    )
    if adapter is None:
        return model
    model = FastLanguageModel.get_peft_model(model, r=4, init_lora_weights=False, **adapter)
    model.trainable = {path: leaf * 1.1 for path, leaf in model.trainable.items()}
    return model


def test_answers_are_the_models_own(model):
    prompt, answers = [5, 6, 7], []
    for weights in ("merged", "lora"):
        with Engine(model, weights=weights, progress=False) as engine:
            answers += engine.generate([prompt], max_new_tokens=5, stop_token_ids=[])
    assert answers[0].token_ids == answers[1].token_ids
    ids = np.array([prompt + answers[0].token_ids])
    logprobs = np.asarray(jax.nn.log_softmax(model.logits(ids)))[0]
    want = [logprobs[at, token] for at, token in enumerate(ids[0, 3:], 2)]
    for answer in answers:
        np.testing.assert_allclose(answer.logprobs, want, atol=SAMPLED_LOGPROBS)


def test_what_they_take(model):
    """The copy is as large as foretold; stored weights are the model's own arrays, but for what is folded."""
    copy = merged(model)
    matrices = [
        p.weights[0] for segment in copy.segments for layer in segment for p in layer if hasattr(p, "weights")
    ]
    assert sum(matrix.nbytes for matrix in matrices) == merged_bytes(model)
    assert not copy.are_stacked
    own = {id(leaf) for leaf in (*model.base.values(), *model.trainable.values())}
    weights = [w for segment in stored(model, read_codes=False).segments for layer in segment
               for p in layer if hasattr(p, "weights") for w in jax.tree.leaves(p.weights)]  # fmt: skip
    assert weights and all(id(leaf) in own for leaf in weights)


def test_adapters_are_folded_where_the_codes_are_read(tiny_model_dir):
    """Of each layer what `fold` makes of its slice; a step reads that instead of A and B."""
    model, _ = FastLanguageModel.from_pretrained(
        tiny_model_dir("qwen2"), dtype="float32", max_seq_length=None
    )
    model = FastLanguageModel.get_peft_model(
        model, r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"]
    )
    weights = stored(model, read_codes=True)
    layers = list(weights.layers())
    assert len(layers) > 1
    for layer in layers:
        want = fold(layer.qkv.weights, layer.qkv.adapters)
        for ours, theirs in zip(layer.qkv.folded, want, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert layer.down.folded is None
    adapters = [layer.qkv.adapters for segment in weights.segments for layer in segment]
    bytes_of = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert step_bytes(weights) == bytes_of((weights.norm, weights.head, weights.segments)) - bytes_of(
        adapters
    )
    assert all(layer.qkv.folded is None for layer in stored(model, read_codes=False).layers())
