"""What is kept for the backward pass: nothing changes but memory and work."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models
from flax import nnx
from tolerances import FP8, FP8_GRADIENT, GRADIENT

from jaxtune import lora, models
from jaxtune.budget import kept_bytes
from jaxtune.kernels import linear, target
from jaxtune.models.names import leaf_shapes, trainable_paths
from jaxtune.models.remat import Remat
from jaxtune.step import loss_sum, make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOKENS = 32
POLICIES = ["all", "attention", "attention+gate_up", "attention+qkv+gate_up", "residual", "none"]


@pytest.fixture(autouse=True)
def rows_enough(monkeypatch):
    """The tests' few rows count as many, so that a GPU's program joins its products."""
    monkeypatch.setattr(linear, "FEW_ROWS", 0)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def fp8_model():
    return tiny_llama(fp8=True)


def tiny_llama(fp8=False):
    """(graphdef, trainable, base, batch) of a tiny Llama in NF4 with random leaves, float32."""
    module = models.build(tiny_models.make_config("llama"), jnp.float32, nf4=True, fp8=fp8)
    lora.attach(module, lora.LoraConfig(r=4))
    shapes, trained, rng = leaf_shapes(module), trainable_paths(module), np.random.default_rng(0)

    def fill(shape):
        if shape.dtype == jnp.uint8:
            return jnp.asarray(rng.integers(0, 256, shape.shape), jnp.uint8)
        return jnp.asarray(rng.normal(size=shape.shape) * 0.05, shape.dtype)

    leaves = {path: fill(shape) for path, shape in shapes.items()}
    ids = jnp.asarray(rng.integers(3, 300, (2, TOKENS)), jnp.int32)
    batch = {
        "input_ids": ids,
        "labels": ids,
        "positions": jnp.broadcast_to(jnp.arange(TOKENS), ids.shape),
        "segment_ids": jnp.ones_like(ids),
        "starts": jnp.zeros((2, 1), jnp.int32),
    }
    trainable = {path: leaf for path, leaf in leaves.items() if path in trained}
    base = {path: leaf for path, leaf in leaves.items() if path not in trained}
    return SimpleNamespace(
        graphdef=nnx.split(module)[0],
        module=module,
        trainable=trainable,
        base=base,
        batch=batch,
        config=module.config,
    )


def gradients(model, remat):
    def loss(trainable):
        return loss_sum(model.graphdef, trainable, model.base, model.batch, remat=remat)[0]

    return jax.jit(jax.value_and_grad(loss)).lower(model.trainable)


@pytest.fixture(scope="module")
def plain(model):
    """Loss and gradients with XLA's own choice of what to keep."""
    return gradients(model, None).compile()(model.trainable)


@pytest.mark.parametrize("text", POLICIES)
def test_what_is_kept_changes_nothing(model, plain, text):
    loss, grads = gradients(model, Remat.parse(text)).compile()(model.trainable)
    np.testing.assert_allclose(loss, plain[0], rtol=GRADIENT)
    for path, want in plain[1].items():
        assert np.abs(grads[path] - want).max() <= GRADIENT * np.abs(want).max(), path


def test_in_fp8_too(fp8_model):
    """Within 8-bit rounding: another fusion computes another last bit, and that may round to another neighbour."""
    losses, grads = zip(
        *(
            gradients(fp8_model, Remat.parse(text)).compile()(fp8_model.trainable)
            for text in ("all", "attention+gate_up", "none")
        )
    )
    np.testing.assert_allclose(losses, losses[0], rtol=FP8 / 10)
    for path, want in grads[0].items():
        for got in grads[1:]:
            assert np.abs(got[path] - want).max() <= FP8_GRADIENT * np.abs(want).max(), path


def test_the_gpu_program_computes_the_same(model, plain):
    """The products that a GPU gets, run here in float32 (where attention stays XLA's)."""
    with target.tracing_for((9, 0)):
        lowered = gradients(model, Remat.parse("attention+gate_up"))
    loss, grads = lowered.compile()(model.trainable)
    np.testing.assert_allclose(loss, plain[0], rtol=GRADIENT)
    for path, want in plain[1].items():
        assert np.abs(grads[path] - want).max() <= GRADIENT * np.abs(want).max(), path


def test_keeping_more_computes_less(model):
    flops = [gradients(model, Remat.parse(text)).compile().cost_analysis()["flops"] for text in POLICIES[:4]]
    assert flops == sorted(flops, reverse=True) and len(set(flops)) == len(flops)


@pytest.mark.parametrize("name", ["model", "fp8_model"])
def test_kept_bytes_are_what_the_backward_pass_gets(name, request):
    """The forecast against the shapes that cross from the forward to the backward pass."""
    model = request.getfixturevalue(name)

    def residual_bytes(text):
        def forward(trainable):
            loss = lambda t: loss_sum(model.graphdef, t, model.base, model.batch, remat=Remat.parse(text))[0]  # noqa: E731
            return jax.vjp(loss, trainable)[1]

        return sum(
            leaf.size * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(jax.eval_shape(forward, model.trainable))
        )

    def forecast(text):
        return kept_bytes(Remat.parse(text), model.config, 2 * TOKENS, 4)[0]

    least = residual_bytes("all") - forecast("all")
    for text in ("gate_up", "qkv", "residual", "gate_up+qkv"):
        assert residual_bytes(text) - forecast(text) == least, text


@pytest.mark.parametrize("text", ["all+offload", "attention+gate_up+offload"])
def test_what_is_kept_leaves_the_device(model, text):
    """Lowered for a GPU: layer inputs and what is named but gate_up, nothing else, are put into pinned host memory."""
    step = make_train_step(model, optax.sgd(1.0), remat=Remat.parse(text))
    batch = {name: column[None] for name, column in model.batch.items()}
    arguments = (model.trainable, optax.sgd(1.0).init(model.trainable), model.base, batch, jax.random.key(0))
    lowered = step.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    moved = [
        line for line in lowered.splitlines() if "annotate_device_placement" in line and "pinned_host" in line
    ]
    c = model.config
    shapes = [f"x{TOKENS}x{c.hidden_size}xf32"]
    if "attention" in text:
        shapes.append(f"x{TOKENS}x{c.num_heads}x{c.head_dim}xf32")
    assert all(any(shape in line for line in moved) for shape in shapes)
    assert all(any(shape in line for shape in shapes) for line in moved)


@pytest.mark.parametrize("documents", [1, 4])
@pytest.mark.parametrize("text", ["none", "all+offload"])
def test_a_gpu_step_lowers_with_cudnn_attention(documents, text):
    """Lowered for an H200 on any machine: cuDNN forward and backward, and no [T, T] array."""
    tokens = 72
    module = models.build(tiny_models.make_config("mistral"), jnp.bfloat16, nf4=True)
    lora.attach(module, lora.LoraConfig(r=4))
    shapes, trained = leaf_shapes(module), trainable_paths(module)
    trainable = {path: shape for path, shape in shapes.items() if path in trained}
    base = {path: shape for path, shape in shapes.items() if path not in trained}
    columns = ("input_ids", "labels", "positions", "segment_ids")
    batch = {column: jax.ShapeDtypeStruct((2, 2, tokens), jnp.int32) for column in columns}
    batch["starts"] = jax.ShapeDtypeStruct((2, 2, documents), jnp.int32)
    optimizer = optax.adamw(1e-4)
    with target.tracing_for((9, 0)):
        graph = SimpleNamespace(graphdef=nnx.split(module)[0], module=module)
        step = make_train_step(graph, optimizer, remat=Remat.parse(text))
        arguments = (trainable, jax.eval_shape(optimizer.init, trainable), base, batch, jax.random.key(0))
        program = step.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in program and "__cudnn$fmhaSoftmax(" in program
    assert ("PADDING_CAUSAL" in program) == (documents > 1)
    assert f"{tokens}x{tokens}x" not in program


def test_names_are_checked():
    assert str(Remat.parse("gate_up+attention")) == "attention+gate_up"
    assert str(Remat.parse("none+offload")) == "none+offload" and str(Remat()) == "all"
    with pytest.raises(ValueError, match="'gateup' is unknown; expected 'auto'"):
        Remat.parse("gateup")
    with pytest.raises(ValueError, match="'all' recomputes everything"):
        Remat.parse("all+qkv")
