"""--plain of step.py and generate.py: parts of a program as XLA alone has them, to see what a kernel is worth.

    linear            q, k, v and o in two products a layer, where jaxtune joins the adapter to the weight
    mlp               gate, up and down each for itself, where jaxtune has one backward pass for the three
    decode_attention  a decode step's attention reads all columns of its caches

gate, up and down are two products each under linear+mlp; under mlp alone they are joined products.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock


def check(design: str, parts: tuple[str, ...]) -> None:
    """Raises ValueError for what is not some of these parts, joined by +."""
    if not set(design.split("+")) <= set(parts):
        raise ValueError(f"--plain {design}: expected some of {', '.join(parts)}, joined by +")


@contextlib.contextmanager
def plain(design: str) -> Iterator[None]:
    """Programs that are traced inside have these parts plain, "" none. What jit has traced before stays as it is."""
    from jaxtune.kernels.linear import reference

    def no(*_: Any) -> bool:
        return False

    changes = {
        "linear": {"jaxtune.models.layers.adapted_linear": reference},
        "mlp": {"jaxtune.models.layers.joinable": no},
        "decode_attention": {
            "jaxtune.kernels.decode_attention.supported": no,
            "jaxtune.generate.wave.supported": no,
        },
    }
    with contextlib.ExitStack() as stack:
        for part in filter(None, design.split("+")):
            for name, change in changes[part].items():
                stack.enter_context(mock.patch(name, change))
        yield
