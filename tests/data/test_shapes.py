"""The shapes of a run's batches: few, large enough, and little padding."""

import numpy as np
import pytest

from jaxtune.data.shapes import choose_shapes, fitting, round_up


def test_every_batch_fits_and_padding_is_small():
    rng = np.random.default_rng(0)
    patches = rng.choice([256, 1024, 1040, 4096], 500) + rng.integers(0, 30, 500)
    needs = {"length": patches // 4 + rng.integers(10, 60, 500), "patches": patches}
    weights = {"length": 2.0, "patches": 1.0}
    shapes = choose_shapes(needs, {"length": 3000, "patches": 10_000}, weights)
    assert len(shapes) <= 5 and shapes[-1]["patches"] >= 10_000
    padded = [fitting(shapes, {name: int(values[i]) for name, values in needs.items()}) for i in range(500)]
    used = sum((weights[name] * values).sum() for name, values in needs.items())
    assert sum(weights[name] * shape[name] for shape in padded for name in needs) < 1.15 * used


def test_batches_of_one_size_have_one_shape():
    needs = {"length": np.full(9, 300), "patches": np.full(9, 2304)}
    most = {"length": 300, "patches": 2304}
    assert choose_shapes(needs, most, {"length": 1.0}) == [{"length": 320, "patches": 2304}]


def test_what_fits_nowhere_is_refused():
    with pytest.raises(ValueError, match="no shape of"):
        fitting([{"length": 8}], {"length": 9})


def test_rounding():
    assert round_up(np.array([1, 63, 64, 65, 129])).tolist() == [1, 63, 64, 128, 192]
