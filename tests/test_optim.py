"""Schedules against transformers, the 8-bit AdamW against the exact one and against bitsandbytes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from jaxtune.config import SFTConfig
from jaxtune.optim import Moment, _count_below, make_optimizer, make_schedule, scale_by_adam_8bit
from jaxtune.quant import dynamic_map


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules_are_those_of_transformers(kind, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    judge = transformers.get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=40)
    schedule = make_schedule(kind, 3e-4, 40, warmup)
    for step in range(41):
        np.testing.assert_allclose(schedule(step), judge.get_last_lr()[0], rtol=1e-5, atol=1e-6 * 3e-4)
        optimizer.step()
        judge.step()


def descend(transform, steps: int = 60):
    """A noisy quadratic; returns the path's end."""
    rng = np.random.default_rng(0)
    target = jnp.asarray(rng.normal(size=(64, 128)), jnp.float32)
    params = {"w": jnp.zeros((64, 128)), "small": jnp.zeros(10)}
    state = transform.init(params)

    @jax.jit
    def step(params, state, noise):
        grads = {"w": params["w"] - target + noise, "small": params["small"] - 1}
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, jax.tree.map(lambda u: -0.05 * u, updates)), state

    for _ in range(steps):
        params, state = step(params, state, 0.1 * jnp.asarray(rng.normal(size=(64, 128)), jnp.float32))
    return params, state, target


def test_8bit_follows_the_exact_optimizer():
    exact, _, target = descend(optax.scale_by_adam())
    rounded, state, _ = descend(scale_by_adam_8bit())
    np.testing.assert_array_equal(rounded["small"], exact["small"])  # below 4,096 elements nothing is rounded
    assert isinstance(state.mu["w"], Moment) and state.mu["w"].codes.dtype == jnp.uint8
    moved = jnp.abs(exact["w"]).mean()
    assert jnp.abs(rounded["w"] - exact["w"]).mean() < 0.03 * moved
    assert jnp.abs(rounded["w"] - target).mean() < 1.1 * jnp.abs(exact["w"] - target).mean()


@pytest.mark.parametrize("signed", [True, False])
def test_8bit_codes_are_the_nearest(signed):
    """Every code is that of the nearest value of the map, at its values, its bounds and beside them."""
    code = dynamic_map(signed)
    bounds = (code[:-1] + code[1:]) / 2
    points = np.concatenate([code, bounds, np.nextafter(bounds, 2), np.nextafter(bounds, -2), [-9, 9]])
    got = np.asarray(_count_below(bounds, jnp.asarray(points)))
    np.testing.assert_array_equal(got, np.searchsorted(bounds, points.astype(np.float32)))


def test_8bit_moments_take_a_quarter():
    params = {"w": jnp.zeros((512, 512))}
    bytes_of = lambda state: sum(leaf.nbytes for leaf in jax.tree.leaves(state))  # noqa: E731
    assert bytes_of(scale_by_adam_8bit().init(params)) < 0.26 * bytes_of(optax.scale_by_adam().init(params))


def test_embeddings_have_their_own_rate_and_norms_no_decay():
    paths = ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.0.self_attn.q_proj.lora_A")
    params = {path: jnp.ones((2, 2)) for path in paths}
    args = SFTConfig(
        learning_rate=1e-2, embedding_learning_rate=1e-3, weight_decay=0.5, lr_scheduler_type="constant"
    )
    optimizer = make_optimizer(args, 10, params)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    got = [float(updates[path][0, 0]) for path in paths]
    np.testing.assert_allclose(got, [-0.5e-3, 0, -0.5e-2], rtol=1e-6)
