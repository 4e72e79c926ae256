"""Sampling against transformers' logits processors; streaming, stopping, batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from jaxtune.fast import FastLanguageModel
from jaxtune.generate import Sampling, TextStreamer
from jaxtune.generate.sampling import filter_logits, penalise, sample
from jaxtune.kernels import nf4_matmul, target
from jaxtune.model import _logits

FILTERS = {
    "temperature": ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
    "top_k": ({"top_k": 7}, [TopKLogitsWarper(7)]),
    "top_p": ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    "tiny top_p": ({"top_p": 1e-4}, [TopPLogitsWarper(1e-4)]),
    "min_p": ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
    "all": (
        {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
        [TemperatureLogitsWarper(1.5), TopKLogitsWarper(40), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)],
    ),
}


def random_logits(rows: int = 6, vocab: int = 200) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, vocab)).astype(np.float32) * 3


@pytest.mark.parametrize("name", FILTERS)
def test_filters_are_those_of_transformers(name):
    options, judges = FILTERS[name]
    want = torch.tensor(random_logits())
    for judge in judges:
        want = judge(None, want)
    got = filter_logits(jnp.asarray(random_logits()), Sampling(do_sample=True, **options))
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)


def test_repetition_penalty_is_that_of_transformers():
    logits, ids = random_logits(), np.random.default_rng(1).integers(0, 200, (6, 30))
    want = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(ids), torch.tensor(logits))
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, ids, True, 1)
    np.testing.assert_allclose(penalise(jnp.asarray(logits), jnp.asarray(seen), 1.3), want.numpy(), rtol=1e-6)


def test_samples_follow_the_distribution():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    drawn = sample(jnp.tile(logits, (20000, 1)), jax.random.key(0), Sampling(do_sample=True))
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 20000, [0.5, 0.3, 0.15, 0.05], atol=0.015)


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return FastLanguageModel.from_pretrained(tiny_model_dir("llama"), dtype="float32", max_seq_length=None)[0]


def test_rows_do_not_depend_on_their_batch(model):
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 320, n).tolist() for n in (5, 33, 64)]
    width = max(map(len, rows))
    ids = np.array([[0] * (width - len(r)) + r for r in rows])
    mask = np.array([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    together = model.generate(ids, mask, max_new_tokens=20, eos_token_id=[])[:, width:]
    for row, answer in zip(rows, together, strict=True):
        alone = model.generate(np.array([row]), np.ones((1, len(row))), max_new_tokens=20, eos_token_id=[])
        np.testing.assert_array_equal(alone[0, len(row) :], answer)


def test_a_row_ends_at_its_stop_token(model):
    ids = np.array([[5, 6, 7, 8], [50, 60, 70, 80]])
    options = {"attention_mask": np.ones_like(ids), "max_new_tokens": 30, "pad_token_id": 1}
    free = model.generate(ids, eos_token_id=[], **options)[:, 4:]
    stop = int(free[0, 9])
    got = model.generate(ids, eos_token_id=stop, **options)[:, 4:]
    for row, whole in zip(got, free, strict=True):
        at = np.flatnonzero(whole == stop)
        end = at[0] + 1 if at.size else len(whole)
        np.testing.assert_array_equal(row[:end], whole[:end])
        assert (row[end:] == 1).all()


def test_the_dense_copy_gives_the_same_tokens(model):
    ids = np.array([[5, 6, 7, 8]])
    _, base = model._weights()
    assert any(path.endswith(".codes") for path in base)
    quantised = model.logits(ids)
    dense_graph, dense = model.for_inference()._weights()
    assert not any(path.endswith(".codes") for path in dense)
    positions, segments = jnp.arange(4)[None], jnp.ones((1, 4), jnp.int32)
    got = _logits(dense_graph, model.trainable, dense, jnp.asarray(ids), positions, segments)
    np.testing.assert_array_equal(quantised, got)
    model.for_training()


@pytest.mark.parametrize("lora", [False, True])
def test_codes_with_decoded_scales_give_the_same_tokens(model, lora, monkeypatch):
    """What a small batch reads on a Hopper GPU; here without the kernel."""
    if lora:
        model = FastLanguageModel.get_peft_model(model, r=4)
    ids = np.array([[5, 6, 7, 8]])
    want = model.generate(ids, max_new_tokens=12, eos_token_id=[])
    monkeypatch.setattr(type(model), "_reads_codes", lambda self, rows: rows == 1)
    _, base = model._weights_for(1)
    scales = [leaf for path, leaf in base.items() if path.endswith(".absmax")]
    assert scales and all(leaf.dtype == jnp.float32 for leaf in scales)
    assert not any(path.endswith(("absmax_scale", "absmax_offset")) for path in base)
    np.testing.assert_array_equal(model.generate(ids, max_new_tokens=12, eos_token_id=[]), want)
    assert any(path.endswith(".codes") for path in model._weights()[1])  # nothing is kept


def test_batches_that_read_the_codes(model, monkeypatch):
    with target.tracing_for((9, 0)):
        assert not model._reads_codes(1)  # float32, and too narrow
        monkeypatch.setattr(nf4_matmul, "CHUNK", 64)
        monkeypatch.setattr(model, "dtype", jnp.bfloat16)
        assert [model._reads_codes(rows) for rows in (1, 64, 65)] == [True, True, False]
    assert not model._reads_codes(1)


def test_sampling_is_repeatable_by_seed(model):
    def run(seed):
        return model.generate(
            "abc", do_sample=True, temperature=2.0, max_new_tokens=12, seed=seed, eos_token_id=[]
        )

    np.testing.assert_array_equal(run(1), run(1))
    assert (run(1) != run(2)).any()


def test_streamer_prints_what_is_returned(model):
    printed = []
    streamer = TextStreamer(model.tokenizer, skip_prompt=True, write=printed.append)
    out = model.generate("abc", max_new_tokens=15, streamer=streamer, eos_token_id=[])
    assert "".join(printed) == model.tokenizer.decode(out[0, 3:]) + "\n"
    assert len(printed) > 5


def test_streamer_takes_one_prompt(model):
    with pytest.raises(ValueError, match="one prompt, got a batch of 2"):
        model.generate(["a", "b"], max_new_tokens=2, streamer=TextStreamer(model.tokenizer))


def test_bad_arguments_raise(model):
    with pytest.raises(ValueError, match="temperature must be above 0"):
        model.generate("a", do_sample=True, temperature=0.0)
    with pytest.raises(TypeError, match="unknown arguments: temprature"):
        model.generate("a", temprature=1.0)
    with pytest.raises(NotImplementedError, match="num_beams=4"):
        model.generate("a", num_beams=4)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        model.generate(np.array([[5], [0]]), np.array([[1], [0]]))
    with pytest.warns(UserWarning, match="no effect without do_sample"):
        model.generate("a", temperature=0.5, max_new_tokens=1)
