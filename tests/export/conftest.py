import numpy as np
import pytest


@pytest.fixture(scope="session")
def ids() -> np.ndarray:
    """Token ids int32 [2, 24]."""
    return np.random.default_rng(1).integers(0, 320, (2, 24), dtype=np.int32)
