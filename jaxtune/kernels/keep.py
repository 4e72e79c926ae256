"""Marking what a layer may keep for its backward pass; `models.remat` chooses among the marks."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxtune.kernels import target

_nothing = ContextVar("nothing", default=False)
_kept: ContextVar[frozenset[str] | None] = ContextVar("kept", default=None)


@contextmanager
def keeping_nothing() -> Iterator[None]:
    """Programs traced inside have no backward pass: without the barriers XLA makes fewer kernels of them."""
    token = _nothing.set(True)
    try:
        yield
    finally:
        _nothing.reset(token)


@contextmanager
def keeping(names: frozenset[str]) -> Iterator[None]:
    """Of what is traced inside, the arrays of these names are kept for the backward pass and others are made again."""
    token = _kept.set(names)
    try:
        yield
    finally:
        _kept.reset(token)


def is_kept(name: str) -> bool:
    """Whether there is a backward pass that finds the arrays of this name kept."""
    return name in (_kept.get() or ())


def is_made_again(name: str) -> bool:
    """Whether there is a backward pass that makes the arrays of this name again."""
    kept = _kept.get()
    return kept is not None and name not in kept


def keep(x: Any, name: str, *, read: bool = True) -> Any:
    """Marks the arrays of a pytree as what `Remat.keep` means by `name`.

    read: whether the forward pass reads them too. On a GPU they then stand behind a barrier: without it XLA fuses the
    product that makes an array with the copy into the stack of kept ones, and runs it again for whoever else reads it.
    """
    if read and target.capability() is not None and not _nothing.get():
        x = jax.lax.optimization_barrier(x)
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, name), x)
