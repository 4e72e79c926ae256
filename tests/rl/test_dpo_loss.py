"""DPO's losses against TRL's torch code, frozen in golden/dpo.npz, and what TRL has no test for."""

import dpo_cases
import golden_numbers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances

from jaxtune.rl.losses.dpo import LOSSES, DPOLossOptions, dpo_loss, sequence_log_probs

CASES = dpo_cases.cases()


@pytest.fixture(scope="module")
def golden():
    return golden_numbers.read("dpo")


@pytest.fixture(scope="module")
def arrays():
    return {name: jnp.asarray(array) for name, array in dpo_cases.arrays().items()}


def close(got, want, name=""):
    want = np.asarray(want)
    got = np.asarray(got).reshape(want.shape)
    largest = np.abs(want).max(initial=0)
    limit = tolerances.RL_LOSS
    np.testing.assert_allclose(got, want, rtol=limit, atol=limit * largest, err_msg=name)


def run(case, arrays):
    """(loss, metrics, gradient, reference sums) of a case."""
    options = DPOLossOptions(**case)
    ref = sequence_log_probs(arrays["ref"], arrays["mask"], options.ld_alpha)

    def loss(log_probs):
        return dpo_loss(log_probs, arrays["mask"], ref, options, log_sum_sq_probs=arrays["log_sum_sq_probs"])

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(arrays["log_probs"])
    return value, metrics, gradient, ref


def test_every_loss_has_cases():
    assert set(dpo_cases.LOSSES) == set(LOSSES)


@pytest.mark.parametrize("name", CASES)
def test_equals_trl(name, golden, arrays):
    value, metrics, gradient, ref = run(CASES[name], arrays)
    want = {key.split(" ")[1]: x for key, x in golden.items() if key.startswith(f"{name} ")}
    close(value, want.pop("loss"))
    close(gradient, want.pop("d_log_probs"), name="d_log_probs")
    close(ref, want.pop("ref"), name="ref")
    assert metrics.keys() == want.keys()
    for key, x in want.items():
        close(metrics[key], x, name=key)


def test_goldens_are_what_trl_gives(golden):
    trl = pytest.importorskip("trl")
    import dpo_judge

    if trl.__version__ != dpo_judge.TRL:
        pytest.skip(f"the goldens are of TRL {dpo_judge.TRL}, this is {trl.__version__}")
    now = dpo_judge.results()
    assert now.keys() == golden.keys()
    for name, want in golden.items():
        np.testing.assert_allclose(now[name].reshape(-1), want, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("name", [n for n in CASES if "-" in n and not n.endswith(("-plain", "-alpha_one"))])
def test_what_a_case_sets_does_something(name, golden):
    loss = name.split("-")[0]
    same = [
        np.allclose(golden[f"{name} {key}"], golden[f"{loss}-plain {key}"], rtol=1e-3, atol=1e-6)
        for key in ("loss", "d_log_probs")
    ]
    assert all(same) == (loss == "sft")  # it has no reference, no β and no pairs


def test_hinge_and_clamp_bind(golden, arrays):
    for name in ("hinge-plain", "clamped"):
        rows = np.abs(golden[f"{name} d_log_probs"].reshape(8, 7)).sum(1)
        assert (rows == 0).any() and (rows > 0).any(), name


@pytest.mark.parametrize("name", [n for n in CASES if n.endswith("-plain") or "-" not in n])
def test_pairs_that_fill_the_batch_do_not_matter(name, arrays):
    """Nor what stands where the mask is 0."""
    wide = {}
    for key, x in arrays.items():
        chosen, rejected = jnp.split(x, 2)
        fill = jnp.full((1, 7), 0 if key == "mask" else jnp.nan)
        wide[key] = jnp.concatenate([fill, chosen, fill, rejected])
    for key in ("log_probs", "ref", "log_sum_sq_probs"):
        wide[key] = jnp.where(wide["mask"] > 0, wide[key], jnp.nan)
    want, metrics, gradient, _ = run(CASES[name], arrays)
    got, found, wide_gradient, _ = run(CASES[name], wide)
    close(got, want)
    close(jnp.concatenate([wide_gradient[1:5], wide_gradient[6:]]), gradient)
    assert not wide_gradient[0].any() and not wide_gradient[5].any()
    for key, x in metrics.items():
        close(found[key], x, name=key)


def test_discopop_of_an_unlikely_pair_is_finite(arrays):
    far = arrays | {"ref": arrays["ref"].at[:4].add(1e3)}
    value, _, gradient, _ = run(CASES["discopop-plain"], far)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_no_pair_at_all(arrays):
    empty = arrays | {"mask": jnp.zeros_like(arrays["mask"])}
    for name in ("sigmoid-weighted", "aot-plain", "sft-plain"):
        value, metrics, gradient, _ = run(CASES[name], empty)
        assert value == 0 and not gradient.any()
        assert all(np.isnan(x) for x in metrics.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": ("dpo",)}, "loss_type='dpo' is not supported; expected some of sigmoid"),
        ({"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0,)}, "one of loss_weights for each"),
        ({"loss_type": ()}, "at least one"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"ld_alpha": 1.5}, "from 0 to 1"),
        ({"label_smoothing": 0.5}, "below 0.5; got 0.5"),
        ({"loss_type": ("exo_pair",)}, "label_smoothing above 0"),
        ({"f_divergence_type": "kl"}, "'reverse_kl', 'forward_kl'"),
        ({"loss_type": ("aot",), "f_divergence_type": "forward_kl"}, "no meaning for aot"),
        ({"loss_type": ("aot",), "use_weighting": True}, "weighs pairs"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        DPOLossOptions(**options)


def test_arrays_are_checked():
    x = jnp.zeros((4, 3))
    with pytest.raises(ValueError, match=r"\[2B, T\].*\(4, 3\), \(4, 2\)"):
        dpo_loss(x, x[:, :2], x[:, 0], DPOLossOptions())
    with pytest.raises(ValueError, match="needs log_sum_sq_probs"):
        dpo_loss(x, x, x[:, 0], DPOLossOptions(use_weighting=True))
