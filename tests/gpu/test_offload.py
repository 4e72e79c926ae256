"""On an NVIDIA GPU (`pytest -m gpu`): layer inputs that wait in host memory come back as they left."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from gpu_checks import fresh_seed
from tolerances import BF16
from transformers import LlamaConfig

from jaxtune import lora, models
from jaxtune.models.names import leaf_shapes, trainable_paths
from jaxtune.models.remat import Remat
from jaxtune.step import make_train_step

pytestmark = pytest.mark.gpu
ROWS, TOKENS, STEPS = 4, 2048, 4
WIDTH, LAYERS = 1024, 12


def _trained(text: str, seed: int) -> dict[str, np.ndarray]:
    """Adapters after a few large steps of SGD: each depends on the gradients of all before it.

    The compiled step holds the layers' inputs in host memory where they are to wait there: most of them at least.
    """
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=2048, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=4, head_dim=128, vocab_size=512, max_position_embeddings=TOKENS,
    )  # fmt: skip
    module = models.build(config, jnp.bfloat16, nf4=True)
    lora.attach(module, lora.LoraConfig(r=8))
    shapes, trained = leaf_shapes(module), trainable_paths(module)

    def fill(number, shape):
        key = jax.random.fold_in(jax.random.key(seed), number)
        if shape.dtype == jnp.uint8:
            return jax.random.bits(key, shape.shape, jnp.uint8)
        return (0.02 * jax.random.normal(key, shape.shape, jnp.float32)).astype(shape.dtype)

    leaves = {path: fill(i, shape) for i, (path, shape) in enumerate(shapes.items())}
    trainable = {path: leaf for path, leaf in leaves.items() if path in trained}
    base = {path: leaf for path, leaf in leaves.items() if path not in trained}
    ids = np.random.default_rng(seed).integers(0, 512, (1, ROWS, TOKENS)).astype(np.int32)
    batch = {"input_ids": ids, "labels": ids, "segment_ids": np.ones_like(ids)}
    batch["positions"] = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), ids.shape)
    batch["starts"] = np.zeros((1, ROWS, 1), np.int32)
    optimizer = optax.sgd(1.0)
    step = make_train_step(
        SimpleNamespace(graphdef=nnx.graphdef(module), module=module), optimizer, remat=Remat.parse(text)
    )
    state = optimizer.init(trainable)
    compiled = step.lower(trainable, state, base, batch, jax.random.key(0)).compile()
    if text.endswith("offload"):
        on_host = compiled.memory_analysis().host_temp_size_in_bytes
        assert on_host > LAYERS * ROWS * TOKENS * WIDTH * jnp.bfloat16.dtype.itemsize / 2
    for n in range(STEPS):
        trainable, state, _ = compiled(trainable, state, base, batch, jax.random.key(n))
    return jax.device_get(trainable)


@pytest.mark.parametrize("text", ["all+offload", "attention+offload", "none+offload", "none"])
def test_training_is_that_of_recomputing(text):
    seed = fresh_seed()
    want, got = _trained("all", seed), _trained(text, seed)
    for path, leaf in want.items():
        error = np.linalg.norm(got[path] - leaf) / np.linalg.norm(leaf)
        assert error <= BF16, f"{path}: {error:.1e}"
