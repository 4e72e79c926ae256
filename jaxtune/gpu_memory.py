"""How much of a GPU JAX may take."""

import os

SHARE = 0.9  # what is left is for CUDA, its libraries and NCCL
LEAST = 0.1
NAME, OLD_NAME = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"  # JAX refuses both together


def claim(others: float = 0.0) -> None:
    """Lets JAX have nine tenths of each GPU's memory instead of three quarters: a training program is alone there.

    JAX reads this when it first looks for devices; later it changes nothing, and what `remat="auto"` fills is what JAX
    has taken. Does nothing where the user has set XLA_CLIENT_MEM_FRACTION or XLA_PYTHON_CLIENT_MEM_FRACTION.

    others: the share of a program that is not alone, as vLLM's.
    """
    if not (os.environ.get(NAME) or os.environ.get(OLD_NAME)):
        os.environ[NAME] = f"{max(SHARE - others, LEAST):.2f}"
