"""Both forms of the weights for every kind of layer: DoRA, partly adapted layers, biases, trained heads and weights."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from tolerances import SAMPLED_LOGPROBS

from jaxtune import lora, models
from jaxtune.fast import FastLanguageModel
from jaxtune.generate import Engine, Sampling, steps
from jaxtune.generate.weights import merged, merged_bytes, reads_codes, step_bytes, stored
from jaxtune.kernels import target
from jaxtune.kernels.nf4_matmul import fold
from jaxtune.models.names import leaf_shapes

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


def test_programs_of_a_gpu_lower():
    """Prefill and decode from the codes, for an H200 on any machine: a step multiplies from the codes and makes no
    16-bit weight; its caches are read by the kernel."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    module = models.build(tiny_models.make_config("llama", head_dim=64, **sizes), jnp.bfloat16, nf4=True)
    lora.attach(module, lora.LoraConfig(r=4))
    shapes, c, rows, prompts = leaf_shapes(module), module.config, 8, 2

    def stored_of(leaves):
        model = SimpleNamespace(module=module, base=leaves, trainable={}, dtype=jnp.bfloat16)
        assert reads_codes(model, rows)
        return stored(model, read_codes=True)

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def caches(count):
        one = jax.ShapeDtypeStruct((count, c.num_kv_heads, 256, c.head_dim), jnp.bfloat16)
        return ((one, one),) * len(c.windows)

    spec = steps.Spec(c, jnp.bfloat16, Sampling(do_sample=True))
    with target.tracing_for((9, 0)):
        weights = jax.eval_shape(stored_of, shapes)
        prefill = steps.prefill.of(weights).trace(
            weights, caches(prompts), ints(prompts, 96), ints(prompts), ints(), spec=spec
        )
        decode = steps.decode.of(weights).trace(
            weights,
            steps.Prompts(caches(prompts), ints(prompts), ints(prompts), ints(prompts)),
            steps.State(caches(rows), ints(rows), ints(), None),
            ints(prompts, rows // prompts, 2),
            jax.ShapeDtypeStruct((), jnp.uint32),
            spec=spec,
            steps=4,
        )
        assert "cudnn" in prefill.lower(lowering_platforms=("cuda",)).as_text()
        program = decode.lower(lowering_platforms=("cuda",)).as_text()
    # of a layer, which is lowered once: four products, and attention to the prompt's cache and the rows' own
    assert program.count("mosaic_gpu") >= 6
    assert not re.search(r"tensor<(512|256|128)x(256|512)xbf16>", program)
