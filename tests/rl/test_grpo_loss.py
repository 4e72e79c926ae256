"""GRPO's losses against TRL's torch code, frozen in golden/grpo.npz, and what TRL has no test for."""

import dataclasses
from functools import partial

import golden_numbers
import grpo_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances

from jaxtune.rl.losses.grpo import (
    active_entropy,
    adapted_entropy_coef,
    grpo_loss,
    high_entropy_mask,
    importance_ratio,
    sampling_metrics,
)
from jaxtune.rl.losses.options import GRPOLossOptions

pytestmark = pytest.mark.usefixtures("quick_compilation")

CASES = grpo_cases.cases()
NUM_ITEMS = 31.0  # of a generation batch, as the judge has it


@pytest.fixture(scope="module")
def golden():
    return golden_numbers.read("grpo")


@pytest.fixture(scope="module")
def arrays():
    return {name: jnp.asarray(array) for name, array in grpo_cases.arrays().items()}


def close(got, want, tolerance=tolerances.RL_LOSS, name=""):
    want = np.asarray(want)
    finite = np.abs(want[np.isfinite(want)])
    absolute = tolerance * finite.max(initial=0)
    got = np.asarray(got).reshape(want.shape)
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=absolute, err_msg=name)


def run(case, arrays, **changes):
    """(loss, metrics, gradients by log_probs and entropies) of a case."""
    called = {"old_log_probs": arrays["extreme_old" if case.get("EXTREME") else "old"]}
    if not case.get("OLD", True):
        called = {}
    if case.get("SAMPLING"):
        called["sampling_log_probs"] = arrays["sampling"]
    options = GRPOLossOptions(
        **grpo_cases.options(case), vllm_importance_sampling_correction=case.get("CORRECTION", True)
    )
    called |= {
        "num_items": NUM_ITEMS,
        "accumulation": case.get("ACCUMULATION", 1),
        "steps_per_generation": case.get("STEPS", 1),
        "ref_log_probs": arrays["ref"],
        "entropy_coef": case.get("ENTROPY_COEF"),
        "train": case.get("TRAIN", True),
    } | changes
    advantages = arrays["token_advantages" if case.get("TOKEN_ADVANTAGES") else "advantages"]

    def loss(log_probs, entropies):
        return grpo_loss(log_probs, advantages, arrays["mask"], options, entropies=entropies, **called)

    differentiate = jax.value_and_grad(loss, (0, 1), has_aux=True)
    (value, metrics), gradients = differentiate(arrays["log_probs"], arrays["entropies"])
    return value, metrics, gradients


@pytest.mark.parametrize("name", CASES)
def test_equals_trl(name, golden, arrays):
    value, metrics, gradients = run(CASES[name], arrays)
    want = {key.split(" ")[2]: x for key, x in golden.items() if key.startswith(f"loss {name} ")}
    close(value, want.pop("loss"))
    close(gradients[0], want.pop("d_log_probs"), name="d_log_probs")
    close(gradients[1], want.pop("d_entropies", np.zeros(gradients[1].size)), name="d_entropies")
    assert metrics.keys() == want.keys()
    for key, x in want.items():
        close(metrics[key], x, name=key)


def test_goldens_are_what_trl_gives(golden):
    trl = pytest.importorskip("trl")
    import grpo_judge

    if trl.__version__ != grpo_judge.TRL:
        pytest.skip(f"the goldens are of TRL {grpo_judge.TRL}, this is {trl.__version__}")
    now = grpo_judge.results()
    assert now.keys() == golden.keys()
    for name, want in golden.items():
        np.testing.assert_allclose(now[name].reshape(-1), want, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("-plain")])
def test_what_a_case_sets_does_something(name, golden):
    plain = f"{name.rsplit('-', 1)[0]}-plain"
    same = [
        np.allclose(golden[f"loss {name} {key}"], golden[f"loss {plain} {key}"], rtol=1e-3, atol=1e-6)
        for key in ("loss", "d_log_probs")
    ]
    assert not all(same)


@pytest.mark.parametrize("level", grpo_cases.LEVELS)
def test_clamps_bind_for_some_and_not_for_others(level, golden, arrays):
    for loss in grpo_cases.CLIPPED:
        for side in ("low", "high"):
            assert 0.1 < golden[f"loss {loss}-{level}-plain clip_ratio/{side}_mean"][0] < 0.5
    assert 0.1 < golden[f"loss cispo-{level}-plain cispo_clip_ratio"][0] < 0.9
    live = np.asarray(arrays["mask"]) > 0
    for mode in grpo_cases.MODES:
        options = GRPOLossOptions(vllm_importance_sampling_mode=mode, **grpo_cases.BOUNDS)
        open_options = dataclasses.replace(
            options,
            vllm_importance_sampling_clip_min=1e-9,
            vllm_importance_sampling_clip_max=1e9,
        )
        old, sampling = (jnp.where(live, arrays[name], 0) for name in ("old", "sampling"))
        bound = importance_ratio(old, sampling, arrays["mask"], options)
        free = importance_ratio(old, sampling, arrays["mask"], open_options)
        if bound.shape[1] > 1:
            bound, free = bound[live], free[live]
        low, high = options.vllm_importance_sampling_clip_min, options.vllm_importance_sampling_clip_max
        assert (free < low).any() and (free > high).any() and ((free > low) & (free < high)).any()
        inside = (free >= low) & (free <= high)
        outside = jnp.clip(free, low, high) if mode.endswith("truncate") else jnp.zeros_like(free)
        np.testing.assert_array_equal(bound, jnp.where(inside, free, outside))


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("-everything")])
def test_what_stands_under_the_mask_does_not_matter(name, arrays):
    rubbish = {
        "log_probs": jnp.inf,
        "old": jnp.nan,
        "ref": -jnp.inf,
        "sampling": jnp.inf,
        "entropies": jnp.nan,
    }
    live = arrays["mask"] > 0
    dirty = arrays | {key: jnp.where(live, arrays[key], x) for key, x in rubbish.items()}
    want, _, gradients = run(CASES[name], arrays)
    got, metrics, found = run(CASES[name], dirty)
    assert got == want
    for a, b in zip(found, gradients):
        np.testing.assert_array_equal(a, b)
        assert not np.asarray(a)[~np.asarray(live)].any()
    assert all(np.isfinite(x) for x in metrics.values())


@pytest.mark.parametrize("level", grpo_cases.LEVELS)
@pytest.mark.parametrize("loss", grpo_cases.LOSSES)
def test_a_batch_without_tokens_gives_zero(loss, level, arrays):
    case = CASES[f"{loss}-{level}-everything"]
    empty = arrays | {"mask": jnp.zeros_like(arrays["mask"])}
    value, metrics, gradients = run(case, empty, num_items=0.0)
    assert value == 0 and not any(np.any(g) for g in gradients)
    if loss in grpo_cases.CLIPPED:  # the mean of no token; TRL leaves it out of the mean of its log
        assert np.isnan(metrics["clip_ratio/low_min"]) == (level == "token")
    assert metrics["entropy"] == 0


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"])
def test_micro_batches_add_up(loss, arrays):
    """Two of three rows in any order are one step; bnpo divides by each micro-batch's own tokens."""
    options = GRPOLossOptions(loss_type=loss, epsilon_high=1.1, beta=0.1, max_completion_length=9)

    def gradient(rows, accumulation):
        names = ("advantages", "mask", "old", "ref")
        advantages, mask, old, ref = (arrays[name][jnp.asarray(rows)] for name in names)
        kwargs = {"num_items": jnp.sum(arrays["mask"]), "steps_per_generation": 2 if accumulation == 2 else 1}
        return jax.grad(
            lambda x: grpo_loss(
                x,
                advantages,
                mask,
                options,
                old_log_probs=old,
                ref_log_probs=ref,
                accumulation=accumulation,
                **kwargs,
            )[0]
        )(arrays["log_probs"][jnp.asarray(rows)])

    whole = gradient(range(6), 1)
    order = [4, 0, 3, 5, 1, 2]
    parts = jnp.concatenate([gradient(order[:3], 2), gradient(order[3:], 2)])
    close(parts[np.argsort(order)], whole)


def test_padding_does_not_matter(arrays):
    """A longer static shape changes nothing, also not the quantile of the entropies."""
    for loss in grpo_cases.LOSSES:
        case = CASES[f"{loss}-token-everything"]
        wide = {key: jnp.pad(x, ((0, 0), (0, 4))) if x.ndim == 2 else x for key, x in arrays.items()}
        want, metrics, gradients = run(case, arrays)
        got, found, gradients_wide = run(case, wide)
        close(got, want)
        close(gradients_wide[0][:, :7], gradients[0])
        for key, x in metrics.items():
            close(found[key], x, name=key)


def test_sampling_metrics_equal_trl(arrays):
    pytest.importorskip("trl")
    import grpo_judge
    import torch

    live = np.asarray(arrays["mask"])
    for mode in grpo_cases.MODES:
        case = {"vllm_importance_sampling_mode": mode, **grpo_cases.BOUNDS}
        old, sampling = (np.where(live > 0, np.asarray(arrays[name]), 0) for name in ("old", "sampling"))
        _, want = grpo_judge.importance_ratio(case, *map(torch.tensor, (old, sampling, live.astype(int))))
        got = sampling_metrics(old, sampling, live, GRPOLossOptions(**case))
        assert got.keys() == want.keys()
        for key, x in want.items():
            close(got[key], x, name=key)
        nothing = sampling_metrics(old, sampling, 0 * live, GRPOLossOptions(**case))
        assert nothing["sampling/sampling_logp_difference/max"] == 0


def test_one_program_for_all_that_changes_between_steps(arrays):
    traces = []

    @partial(jax.jit, static_argnames=("options",))
    def step(log_probs, entropies, scalars, options):
        traces.append(options)
        return grpo_loss(
            log_probs,
            arrays["advantages"],
            arrays["mask"],
            options,
            entropies=entropies,
            old_log_probs=arrays["old"],
            ref_log_probs=arrays["ref"],
            **scalars,
        )

    case = CASES["dapo-token-everything"] | {"vllm_importance_sampling_mode": "sequence_mask"}
    options = GRPOLossOptions(**grpo_cases.options(case))
    for items, accumulation, steps, coef in ((31.0, 3, 6, 0.02), (17.0, 2, 4, 0.0)):
        scalars = {
            "num_items": jnp.float32(items),
            "accumulation": jnp.int32(accumulation),
            "steps_per_generation": jnp.int32(steps),
            "entropy_coef": jnp.float32(coef),
        }
        got, _ = step(arrays["log_probs"], arrays["entropies"], scalars, options)
        want, _, _ = run(case | {"SAMPLING": False}, arrays, **scalars)
        close(got, want)
    assert len(traces) == 1


def test_entropy_for_an_adaptive_bonus(arrays):
    options = GRPOLossOptions(top_entropy_quantile=0.3)
    kept = high_entropy_mask(arrays["entropies"], arrays["mask"], 0.3)
    assert 0 < jnp.sum(kept) < jnp.sum(arrays["mask"])
    total, count = active_entropy(arrays["entropies"], arrays["mask"], options)
    assert count == jnp.sum(kept)
    close(total, jnp.sum(arrays["entropies"] * kept))
    bounds = {"target": 0.2, "delta": 0.005, "minimum": 0.0, "maximum": 0.012}
    assert adapted_entropy_coef(0.01, 0.2, **bounds) == np.float32(0.012)
    assert adapted_entropy_coef(0.01, 0.3, **bounds) == np.float32(0.005)
    assert adapted_entropy_coef(0.001, 0.3, **bounds) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type='ppo'.*'grpo', 'bnpo'"),
        ({"importance_sampling_level": "word"}, "'token', 'sequence'"),
        ({"top_entropy_quantile": 1.5}, "share from 0 to 1"),
        ({"sapo_temperature_neg": 0.0}, "sapo_temperature_neg must be above 0"),
        ({"vllm_importance_sampling_clip_min": 4.0}, "must be below"),
        (
            {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": None},
            "needs vllm_importance_sampling_clip_max",
        ),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        GRPOLossOptions(**options)


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({}, {"num_items": None}, "needs num_items"),
        ({"beta": 0.1}, {"ref_log_probs": None}, "beta=0.1 needs ref_log_probs"),
        ({"top_entropy_quantile": 0.5}, {"entropies": None}, "need entropies"),
        ({}, {"mask": jnp.ones((6, 5))}, r"one shape \[B, T\]"),
        ({}, {"advantages": jnp.ones(5)}, r"expected advantages \(6,\)"),
        (
            {"loss_type": "vespo"},
            {"sampling_log_probs": jnp.zeros((6, 7))},
            "'token_truncate' or 'token_mask'",
        ),
    ],
)
def test_arrays_are_checked(arrays, options, changes, message):
    given = {
        "log_probs": arrays["log_probs"],
        "advantages": arrays["advantages"],
        "mask": arrays["mask"],
        "num_items": 1.0,
        "entropies": arrays["entropies"],
    }
    with pytest.raises(ValueError, match=message):
        grpo_loss(options=GRPOLossOptions(**options), **given | changes)
