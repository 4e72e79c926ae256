"""What a loop over layers keeps is made in its stack, and no number changes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from tolerances import REWRITTEN

from jaxtune import in_place

LAYERS, ROWS, WIDTH = 3, 8, 16


def loss(weights, x, reverse=False):
    def layer(x, weight):
        wide = checkpoint_name(x @ weight, "wide")
        small = checkpoint_name(jnp.sin(wide[:, :2]), "small")
        once = checkpoint_name(jnp.cos(wide), "once")  # which the backward pass alone reads
        return x + jnp.tanh(wide) * small.sum() + once * weight.sum(), None

    policy = jax.checkpoint_policies.save_only_these_names("wide", "small", "once")
    y, _ = jax.lax.scan(jax.checkpoint(layer, policy=policy), x, weights, reverse=reverse)
    return (y * y).mean()


def arrays():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return draw(LAYERS, WIDTH, WIDTH), draw(ROWS, WIDTH)


def numbers_handed_on(weights, x):
    """A carry and outputs that are numbers of the program's text, and one output twice."""

    def layer(_, weight):
        kept = checkpoint_name(jnp.sin(x @ weight), "wide")
        return 1.0, (kept * kept, kept, kept, 2.0, jnp.arange(3.0))

    last, outputs = jax.lax.scan(layer, 0.0, weights)
    return last + sum(each.sum() for each in outputs)


def nothing_handed_on(weights, x):
    return jax.lax.map(lambda weight: jnp.sin(checkpoint_name(jnp.cos(x @ weight), "wide")), weights).sum()


@pytest.mark.parametrize(
    "function", [loss, partial(loss, reverse=True), numbers_handed_on, nothing_handed_on]
)
def test_no_number_changes(function):
    ours, theirs = (
        jax.jit(make(function, argnums=(0, 1)))(*arrays())
        for make in (in_place.value_and_grad, jax.value_and_grad)
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=REWRITTEN)


def forward_scan(value_and_grad):
    """(how many arrays it carries, how many it stacks, how many barriers stand in it)"""
    traced = jax.make_jaxpr(value_and_grad(loss))(*arrays())
    scan = next(each for each in traced.eqns if each.primitive.name == "scan")
    carried, stacked = (len(list(part)) for part in scan.params["ft_out"].unpack())
    return carried, stacked, str(scan.params["jaxpr"]).count("optimization_barrier")


def test_large_arrays_are_made_in_place_and_small_ones_behind_a_barrier():
    """Carried: x, the turn's number and the stacks of `wide` and of `once`, as large as x. Stacked: `small`, x."""
    assert forward_scan(jax.value_and_grad)[0] == 1
    assert forward_scan(in_place.value_and_grad) == (4, 2, 1)


def test_a_loop_that_keeps_nothing_by_name_stays():
    def plain(xs):
        return jax.lax.scan(lambda total, x: (total + x * total, jnp.sin(total)), 1.0, xs)[0]

    xs = jnp.arange(3.0)
    ours, theirs = (
        str(jax.make_jaxpr(make(plain))(xs)) for make in (in_place.value_and_grad, jax.value_and_grad)
    )
    assert ours == theirs
