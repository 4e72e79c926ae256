"""Advantages against TRL's torch code, frozen in golden/grpo.npz."""

import golden_numbers
import grpo_cases
import numpy as np
import pytest
import tolerances

from jaxtune.rl.advantages import Advantages, compute_advantages

CASES = grpo_cases.reward_cases()


@pytest.fixture(scope="module")
def golden():
    return golden_numbers.read("grpo")


@pytest.mark.parametrize("name", CASES)
def test_equals_trl(name, golden):
    got = compute_advantages(**CASES[name])
    for field in Advantages._fields:
        want = golden[f"advantages {name} {field}"]
        x = np.asarray(getattr(got, field)).reshape(-1)
        largest = np.max(np.abs(want), initial=0, where=np.isfinite(want))
        limit = tolerances.ADVANTAGE if field == "values" else tolerances.RL_LOSS
        np.testing.assert_allclose(x, want, rtol=limit, atol=limit * largest, err_msg=field)


def test_equal_rewards_give_no_signal():
    got = compute_advantages(**CASES["equal-group-sum_then_normalize"])
    assert not got.values.any() and got.frac_reward_zero_std == 1


def test_a_silent_row_moves_nobody():
    """It has no advantage, and the others' are those of the group without it."""
    kept = np.array([[1.0], [0.0], [2.0]])
    got = compute_advantages(np.vstack([kept, [[np.nan]]]), np.ones(1), group=4)
    want = compute_advantages(kept, np.ones(1), group=3)
    assert got.values[3] == 0
    np.testing.assert_allclose(got.values[:3], want.values, rtol=tolerances.ADVANTAGE)


def test_a_single_reward_in_a_group_has_no_advantage():
    got = compute_advantages(**CASES["one_in_group-group-sum_then_normalize"])
    assert got.values[0] == 0 and got.values[3] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": 5}, "12 rewards do not make whole groups of 5"),
        ({"weights": np.ones(3)}, "one weight for each reward function"),
        ({"scale_rewards": "row"}, "'group', 'batch', 'none'"),
        ({"aggregation": "mean"}, "'sum_then_normalize', 'normalize_then_sum'"),
    ],
)
def test_bad_input_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        compute_advantages(**CASES["dense-group-sum_then_normalize"] | changes)
