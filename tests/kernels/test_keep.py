"""The barrier around what is kept: there for a program that is differentiated on a GPU, not for generation."""

import jax
import jax.numpy as jnp

from jaxtune.kernels import target
from jaxtune.kernels.keep import keep, keeping_nothing


def barriers() -> int:
    return str(jax.make_jaxpr(lambda x: keep(x, "qkv"))(jnp.ones(2))).count("optimization_barrier")


def test_the_barrier_is_there_only_where_something_may_be_kept():
    assert barriers() == 0
    with target.tracing_for((9, 0)):
        assert barriers() == 1
        with keeping_nothing():
            assert barriers() == 0
        assert barriers() == 1


def test_none_where_nobody_else_reads_it():
    with target.tracing_for((9, 0)):
        traced = jax.make_jaxpr(lambda x: keep(x, "qkv", read=False))(jnp.ones(2))
    assert "optimization_barrier" not in str(traced)
