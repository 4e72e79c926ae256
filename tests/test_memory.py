"""The frozen base in a compiled step: never differentiated, copied or kept dequantised."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import optax
import pytest
import tiny_models
from flax import nnx

from jaxtune import lora, models
from jaxtune.models.names import leaf_shapes, trainable_paths
from jaxtune.models.remat import Remat
from jaxtune.step import make_train_step

WIDTH, FFN, TOKENS = 512, 2048, 64
# 16-bit bytes of a layer's seven matrices: what one layer costs dequantised
DENSE_LAYER = 2 * (2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2 + 3 * WIDTH * FFN)


def compiled_memory(layers: int, remat: str):
    """(memory analysis of a compiled step, bytes of codes and scales, bytes of the adapter)."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": FFN, "head_dim": 128, "num_hidden_layers": layers}
    module = models.build(tiny_models.make_config("llama", **sizes), jnp.bfloat16, nf4=True)
    lora.attach(module, lora.LoraConfig(r=8))
    shapes, trained = leaf_shapes(module), trainable_paths(module)
    trainable = {path: s for path, s in shapes.items() if path in trained}
    base = {path: s for path, s in shapes.items() if path not in trained}
    optimizer = optax.adamw(1e-4)
    columns = ("input_ids", "labels", "positions", "segment_ids")
    batch = {column: jax.ShapeDtypeStruct((2, 1, TOKENS), jnp.int32) for column in columns}
    step = make_train_step(
        SimpleNamespace(graphdef=nnx.split(module)[0], module=module),
        optimizer,
        remat=Remat.parse(remat),
        loss_chunk=64,
    )
    arguments = (trainable, jax.eval_shape(optimizer.init, trainable), base, batch, jax.random.key(0))
    analysis = step.lower(*arguments).compile().memory_analysis()
    size = lambda leaves: sum(s.size * s.dtype.itemsize for s in leaves)  # noqa: E731
    packed = size(s for path, s in base.items() if ".codes" in path or ".absmax" in path)
    return analysis, packed, size(trainable.values())


@pytest.mark.parametrize("remat", ["all", "attention+gate_up", "none"])
def test_temporary_memory_is_one_dense_layer(remat):
    analysis, packed, adapter = compiled_memory(layers=12, remat=remat)
    activations = 12 * TOKENS * (8 * WIDTH + 4 * FFN) * 4  # what differentiation may keep without remat
    assert packed < 0.27 * 12 * DENSE_LAYER
    assert (
        analysis.temp_size_in_bytes
        < 4 * DENSE_LAYER + 2 * adapter + activations
        < 8 * DENSE_LAYER + activations
    )
    assert analysis.argument_size_in_bytes > packed  # the base is an argument, not a constant of the program
    assert analysis.alias_size_in_bytes >= 3 * adapter  # adapter and both moments are updated in place


def test_temporary_memory_does_not_grow_with_the_base():
    shallow, _, adapter_4 = compiled_memory(layers=4, remat="all")
    deep, _, adapter_12 = compiled_memory(layers=12, remat="all")
    grown = deep.temp_size_in_bytes - shallow.temp_size_in_bytes
    assert grown < 3 * (adapter_12 - adapter_4) + 8 * 4 * TOKENS * WIDTH * 4
    assert grown < 0.25 * 8 * DENSE_LAYER
