"""For tests on a GPU: inputs that are new in each run, and NaN in the memory that results are written to."""

import os
import secrets
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# Bytes of the arrays that fill free memory, and how many of each: small ones go into gaps between others.
FILLING, EACH = [2**power for power in range(29, 9, -1)], 3


def fresh_seed() -> int:
    """Printed where a test fails; JAXTUNE_SEED repeats it."""
    seed = int(os.environ.get("JAXTUNE_SEED") or secrets.randbits(31))
    print(f"JAXTUNE_SEED={seed}")
    return seed


class Draws:
    """New random arrays, one after the other."""

    def __init__(self):
        self.key = jax.random.key(fresh_seed())

    def next_key(self) -> jax.Array:
        self.key, key = jax.random.split(self.key)
        return key

    def normal(self, *shape: int, dtype=jnp.float32) -> jax.Array:
        return jax.random.normal(self.next_key(), shape, jnp.float32).astype(dtype)

    def powers_of_two(self, *shape: int) -> jax.Array:
        return 2.0 ** jax.random.randint(self.next_key(), shape, -3, 4).astype(jnp.float32)


def _poison(shape) -> jax.Array:
    if jnp.issubdtype(shape.dtype, jnp.floating):
        return jnp.full(shape.shape, jnp.nan, shape.dtype)
    return jnp.full(shape.shape, jnp.iinfo(shape.dtype).max, shape.dtype)


def _fill_free_memory() -> None:
    held = [jnp.full(size // 4, jnp.nan, jnp.float32) for size in FILLING for _ in range(EACH)]
    for array in jax.block_until_ready(held):
        array.delete()


def poisoned(function: Callable) -> Callable:
    """`function` compiled; whatever it leaves unwritten of its results is NaN, and most of what it leaves of others.

    The results take the place of arrays of NaN (of the largest number, for integers); memory was full of them before.
    """

    def call(*arguments):
        poison = jax.tree.map(_poison, jax.eval_shape(function, *arguments))
        jitted = jax.jit(lambda _, *given: function(*given), donate_argnums=0, keep_unused=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of an array that no result takes the place of
            compiled = jitted.lower(poison, *arguments).compile()
        _fill_free_memory()
        return compiled(poison, *arguments)

    return call


def kernels_in(function: Callable, *arguments) -> int:
    """How many of our kernels the program of a GPU calls, as it is before XLA compiles it."""
    traced = jax.jit(lambda *given: function(*given)).trace(*arguments)
    return traced.lower(lowering_platforms=("cuda",)).as_text().count("custom_call @mosaic_gpu")


def relative(got, want) -> float:
    """Norm of the difference over the norm: of all, or of the worst row, column, …, if that is far worse than all.

    What is got must be finite. A slice of n numbers, of mean size if it is smaller, may err 2.5 + 8/√n times as much as
    all: the worst of normal errors is 5 times as large for n = 1 and 1.1 times for n = 1024, but the gradient of the
    query of a document's second token, rounded to bfloat16, was seen to err 3.5 times as much for n = 512. One wrong
    number in a row of 4096 that is otherwise exact counts as 8e-3.
    """
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    assert np.isfinite(got).all()
    error, square = (got - want) ** 2, want**2
    found = [np.sqrt(error.sum() / square.sum())]
    for axis in range(want.ndim):
        others = tuple(i for i in range(want.ndim) if i != axis)
        errors, squares = error.sum(others), square.sum(others)
        worst = np.sqrt((errors / np.maximum(squares, squares.mean())).max())
        found.append(worst / (2.5 + 8 / np.sqrt(want.size / len(squares))))
    return float(max(found))
