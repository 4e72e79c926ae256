"""Marking what a layer may keep for its backward pass; `models.remat` chooses among the marks."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

_kept: ContextVar[frozenset[str] | None] = ContextVar("kept", default=None)


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


def keep(x: Any, name: str) -> Any:
    """Marks the arrays of a pytree as what `Remat.keep` means by `name`."""
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, name), x)
