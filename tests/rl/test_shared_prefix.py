"""A prompt computed once for its completions: the same log-probabilities, gradients and training."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models
from flax import nnx
from tolerances import GRADIENT, LOSS

from jaxtune import lora, models
from jaxtune.fast import FastLanguageModel
from jaxtune.kernels import target
from jaxtune.models.names import leaf_shapes, trainable_paths
from jaxtune.rl.config import GRPOConfig
from jaxtune.rl.experience import Collator, Experience
from jaxtune.rl.groups import GroupCollator
from jaxtune.rl.losses.options import GRPOLossOptions
from jaxtune.rl.step import log_probs, make_grpo_step
from jaxtune.rl.trainer import GRPOTrainer

pytestmark = pytest.mark.usefixtures("quick_compilation")
GROUP, EOS = 2, 2


def load(folder):
    base = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=128, dtype="float32", load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(base[0], r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    rng = np.random.default_rng(0)
    model.trainable = {
        n: jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype) for n, x in model.trainable.items()
    }
    return model


@pytest.fixture
def experience():
    """Two groups of two; prompts of 9 and 64 tokens, completions of 1 to 64 (both lengths fill their bucket once)."""
    rng = np.random.default_rng(1)
    tokens = lambda n: rng.integers(3, 259, n).astype(np.int32)  # noqa: E731
    prompts = [tokens(9), tokens(64)]
    completions = [tokens(n) for n in (5, 64, 1, 20)]
    masks = [(rng.random(len(ids)) < 0.8).astype(np.float32) for ids in completions]
    return Experience([prompts[i // GROUP] for i in range(4)], completions, np.ones(4, np.float32), 60.0,
                      {"mask": masks})  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "mistral_window"])
def test_log_probs_and_gradients_are_those_of_rows_apart(family, experience, tiny_model_dir):
    model = load(tiny_model_dir(family, num_hidden_layers=1))
    weights = [np.random.default_rng(i).standard_normal(64).astype(np.float32) for i in range(4)]
    found = {}
    for name, collator in (("apart", Collator(128, 0)), ("shared", GroupCollator(64, 64, 0, GROUP))):
        batch = {key: value[0] for key, value in collator([(experience, range(4))], 4).items()}

        def total(trainable, batch=batch, collator=collator):
            chosen, entropies = log_probs(model.graphdef, trainable, model.base, batch, 0.9, chunk=32)
            upstream = np.zeros(chosen.shape, np.float32)
            for b in range(4):  # the same weight for the same token, wherever it stands
                count, start = len(experience.completion_ids[b]), 0
                if isinstance(collator, Collator):
                    start = len(experience.prompt_ids[b]) - 1
                upstream[b, start : start + count] = weights[b][:count]
            return jnp.sum(upstream * (chosen + 0.5 * entropies)), chosen

        (_, chosen), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(model.trainable)
        found[name] = collator.unpad(np.asarray(chosen), experience, range(4)), grads
    for ours, theirs in zip(found["shared"][0], found["apart"][0], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=LOSS, atol=LOSS)
    for path, theirs in found["apart"][1].items():
        ours = found["shared"][1][path]
        assert np.abs(ours - theirs).max() <= 10 * GRADIENT * np.abs(theirs).max(), path


def test_fewer_tokens_and_few_shapes(experience):
    apart = Collator(128, 0)([(experience, range(4))], 4)
    collator = GroupCollator(64, 64, 0, GROUP)
    shared = collator([(experience, range(4))], 4)
    assert apart["segment_ids"].sum() - shared["segment_ids"].sum() == 9 + 64  # each prompt once less
    half = collator([(experience, range(2)), (experience, ())], 2)  # and an empty micro-batch
    assert half["input_ids"].shape == (2, 1, 64 + 2 * 64) and not half["mask"][1].any()
    other = Experience([np.asarray([1]), np.asarray([2])], experience.completion_ids[:2], np.ones(2), 1.0, {})
    with pytest.raises(ValueError, match="same prompt_ids for all completions"):
        collator([(other, range(2))], 2)


def rollout(prompts, trainer):
    rng = np.random.default_rng(trainer.state.global_step)
    ids = [[*rng.integers(3, 259, rng.integers(1, 9)).tolist(), EOS] for _ in prompts]
    return {
        "prompt_ids": trainer.tokenizer(text=list(prompts))["input_ids"],
        "completion_ids": ids,
        "logprobs": None,
    }


def low(completion_ids, **_):
    return [float(np.mean(np.asarray(ids) < 100)) for ids in completion_ids]


def test_training_is_the_same(tiny_model_dir, tmp_path):
    """Old and reference log-probabilities, the loss and the step; rows are shuffled inside one micro-batch only."""
    runs = []
    for shared in (False, True):
        model = load(tiny_model_dir("llama", num_hidden_layers=1))
        args = GRPOConfig(
            str(tmp_path / str(shared)), shared_prefix=shared, per_device_train_batch_size=8, num_generations=2,
            num_iterations=2, beta=0.04, max_completion_length=10, max_steps=3, learning_rate=2e-3, logging_steps=1,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        rows = [{"prompt": "x" * n} for n in (2, 9, 4, 7)]
        trainer = GRPOTrainer(model, low, args, rows, rollout_func=rollout)
        trainer.train()
        runs.append(trainer)
    for ours, theirs in zip(runs[1].state.log_history[:3], runs[0].state.log_history[:3], strict=True):
        for name in ("loss", "grad_norm", "kl", "entropy", "reward"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e2 * LOSS, abs=1e-6), name
    for path, theirs in runs[0].model.trainable.items():
        np.testing.assert_allclose(runs[1].model.trainable[path], theirs, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="shared_prefix=True needs whole groups"):
        GRPOConfig(shared_prefix=True, per_device_train_batch_size=2, gradient_accumulation_steps=4)


@pytest.mark.parametrize("shared", [False, True])
def test_a_gpu_step_lowers_with_cudnn_attention(shared):
    """Lowered for an H200 on any machine: cuDNN forward and backward, no [T, T] array, no logits of the prompt."""
    prompt, completion, rows = 40, 36, 4
    module = models.build(tiny_models.make_config("llama"), jnp.bfloat16, nf4=True)
    lora.attach(module, lora.LoraConfig(r=4))
    shapes, trained = leaf_shapes(module), trainable_paths(module)
    trainable = {path: shape for path, shape in shapes.items() if path in trained}
    base = {path: shape for path, shape in shapes.items() if path not in trained}
    ids = [np.full(n, 5, np.int32) for n in (prompt, completion)]
    experience = Experience(
        [ids[0]] * rows,
        [ids[1]] * rows,
        np.ones(rows, np.float32),
        1.0,
        {"mask": [np.ones(completion, np.float32)] * rows},
    )
    collator = GroupCollator(prompt, completion, 0, GROUP) if shared else Collator(prompt + completion, 0)
    batch = collator([(experience, range(rows))] * 2, rows) | {"accumulation": np.full(2, 2, np.float32)}
    optimizer = optax.adamw(1e-4)
    with target.tracing_for((9, 0)):
        graph = types.SimpleNamespace(graphdef=nnx.split(module)[0], module=module)
        step = make_grpo_step(graph, optimizer, GRPOLossOptions(), temperature=1.0, steps_per_generation=2)
        arguments = (trainable, jax.eval_shape(optimizer.init, trainable), base, batch, jax.random.key(0))
        program = step.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in program and "__cudnn$fmhaSoftmax(" in program
    assert ("PADDING_CAUSAL" in program) == shared
    length = prompt + completion
    assert f"{length}x{length}x" not in program
    assert (
        f"tensor<{2 if shared else rows}x{prompt + 2 * completion if shared else length}x128xbf16>" in program
    )
