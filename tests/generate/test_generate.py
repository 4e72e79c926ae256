"""`Model.generate`: padding, stopping, streaming, and what it keeps of the weights."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.fast import FastLanguageModel
from jaxtune.generate import TextStreamer
from jaxtune.generate.weights import reads_codes, stored
from jaxtune.kernels import nf4_matmul, target

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def model(tiny_model_dir, quick_compilation):
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


def test_for_inference_keeps_the_copy_and_for_training_frees_it(model):
    model.generate("a", max_new_tokens=1)
    assert not model._engine._loaded
    model.for_inference()
    assert not model._engine._loaded  # nothing is made that nobody reads
    model.generate("a", max_new_tokens=1)
    kept = model._engine._loaded["merged", False]
    model.generate("a", max_new_tokens=1)
    assert model._engine._loaded["merged", False] is kept
    model.for_training()
    assert not model._engine._loaded


@pytest.mark.parametrize("adapted", [False, True])
def test_codes_with_decoded_scales_give_the_same_tokens(model, tiny_model_dir, adapted, monkeypatch):
    """What a small batch reads on a Hopper GPU; here without the kernel."""
    ids = np.array([[5, 6, 7, 8]])
    if adapted:
        model, _ = FastLanguageModel.from_pretrained(
            tiny_model_dir("llama"), dtype="float32", max_seq_length=None
        )
        model = FastLanguageModel.get_peft_model(model, r=4, init_lora_weights=False)
    want = model.generate(ids, max_new_tokens=12, eos_token_id=[])
    monkeypatch.setattr("jaxtune.generate.engine.reads_codes", lambda model, rows: rows == 1)
    weights = stored(model, read_codes=True).segments[0][0].qkv.weights
    assert [w.absmax.dtype for w in weights] == [jnp.float32] * 3 and weights[0].absmax_scale is None
    np.testing.assert_array_equal(model.generate(ids, max_new_tokens=12, eos_token_id=[]), want)
    assert model._engine.weights == "lora"


def test_batches_that_read_the_codes(model, monkeypatch):
    with target.tracing_for((9, 0)):
        assert not reads_codes(model, 1)  # float32, and too narrow
        monkeypatch.setattr(nf4_matmul, "CHUNK", 64)
        monkeypatch.setattr(model, "dtype", jnp.bfloat16)
        assert [reads_codes(model, rows) for rows in (1, 64, 65)] == [True, True, False]
    assert not reads_codes(model, 1)


def test_stop_strings_and_several_answers(model):
    free = model.generate("abc", max_new_tokens=12, eos_token_id=[])[0, 3:]
    stop = model.tokenizer.decode(free[2:4])
    got = model.generate("abc", max_new_tokens=12, eos_token_id=[], stop_strings=stop, num_return_sequences=2)
    assert got.shape[0] == 2 and (got[0] == got[1]).all()  # greedy
    text = model.tokenizer.decode(got[0, 3:])
    assert stop in text and stop not in model.tokenizer.decode(got[0, 3:-1])


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
    with pytest.raises(ValueError, match="one answer, got num_return_sequences=2"):
        model.generate("a", num_return_sequences=2, streamer=TextStreamer(model.tokenizer))
    with pytest.warns(UserWarning, match="no effect without do_sample"):
        model.generate("a", temperature=0.5, max_new_tokens=1)
