"""compute_dtype="fp8": what it goes with, and that a model trains with it as without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import batch_of
from tolerances import FP8

from jaxtune.config import SFTConfig
from jaxtune.fast import FastLanguageModel, in_fp8
from jaxtune.kernels import linear, target
from jaxtune.optim import make_optimizer
from jaxtune.step import make_eval_step, make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize(
    "compute_dtype, dtype, nf4, message",
    [
        ("int8", jnp.bfloat16, True, "compute_dtype='int8' is not supported; expected 'fp8', or None"),
        ("fp8", jnp.bfloat16, False, "load the model with load_in_4bit=True"),
        ("fp8", jnp.float16, True, "got float16"),
    ],
)
def test_what_fp8_does_not_go_with(compute_dtype, dtype, nf4, message):
    with pytest.raises(ValueError, match=message):
        in_fp8(compute_dtype, dtype, nf4=nf4)
    assert not in_fp8(None, dtype, nf4=nf4)


@pytest.mark.parametrize(
    "capability, fits", [((7, 5), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)]
)
def test_fp8_asks_for_a_gpu_that_has_it(capability, fits):
    with target.tracing_for(capability):
        if fits:
            assert in_fp8("fp8", jnp.bfloat16, nf4=True)
        else:
            with pytest.raises(
                ValueError, match=f"8.9 or later .* this one has {capability[0]}.{capability[1]}"
            ):
                in_fp8("fp8", jnp.bfloat16, nf4=True)


def test_sixteen_bit_models_refuse_fp8(tiny_model_dir):
    with pytest.raises(ValueError, match="load_in_4bit=True"):
        FastLanguageModel.from_pretrained(tiny_model_dir("llama"), load_in_16bit=True, compute_dtype="fp8")


@pytest.mark.parametrize(
    "family, changes", [("qwen2", {}), ("llama", {"lora_dropout": 0.1, "use_dora": True})]
)
def test_training_in_fp8_follows_training_without(tiny_model_dir, monkeypatch, family, changes):
    """The same steps end at nearly the same losses: with biases, dropout and DoRA too, where the adapter is apart."""
    monkeypatch.setattr(linear, "FEW_ROWS", 0)
    batch, losses = batch_of([20, 30, 14], 64), {}
    for compute_dtype in (None, "fp8"):
        model, _ = FastLanguageModel.from_pretrained(
            tiny_model_dir(family), dtype="float32", max_seq_length=None, compute_dtype=compute_dtype
        )
        assert model.compute_dtype == compute_dtype
        model = FastLanguageModel.get_peft_model(model, r=4, **changes)
        optimizer = make_optimizer(SFTConfig(learning_rate=1e-2), 10, model.trainable)
        step, state, losses[compute_dtype] = (
            make_train_step(model, optimizer),
            optimizer.init(model.trainable),
            [],
        )
        for i in range(4):
            model.trainable, state, metrics = step(
                model.trainable, state, model.base, batch, jax.random.key(i)
            )
            losses[compute_dtype].append(float(metrics["loss"]))
        evaluated = make_eval_step(model)(model.trainable, model.base, {k: v[0] for k, v in batch.items()})
        losses[compute_dtype].append(float(evaluated["loss_sum"] / evaluated["num_items"]))
    plain, eighth = (np.array(losses[key]) for key in (None, "fp8"))
    assert plain[-1] < 0.9 * plain[0] and np.abs(plain - eighth).max() < FP8 * plain[0]
    assert (plain != eighth).any()


def test_generation_is_as_without_fp8(tiny_model_dir):
    """Few rows do not take part, so that answers do not depend on how a model was loaded."""
    answers = []
    for compute_dtype in (None, "fp8"):
        model, _ = FastLanguageModel.from_pretrained(
            tiny_model_dir("llama"), dtype="float32", max_seq_length=None, compute_dtype=compute_dtype
        )
        answers.append(model.generate([[5, 6, 7, 8]], max_new_tokens=8))
    np.testing.assert_array_equal(*answers)
