"""The parts of the step that the runs against PEFT do not show: document borders, noise, clipping, accumulation."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh
from tolerances import LOSS
from transformers import LlamaConfig

from jaxtune import models
from jaxtune.config import SFTConfig
from jaxtune.devices import AXES, ONE_DEVICE, Layout
from jaxtune.fast import FastLanguageModel
from jaxtune.kernels import target
from jaxtune.models.remat import Remat
from jaxtune.optim import make_optimizer
from jaxtune.rl.dpo_step import make_dpo_eval, make_pair_log_probs
from jaxtune.rl.losses.dpo import DPOLossOptions
from jaxtune.rl.losses.options import GRPOLossOptions
from jaxtune.rl.step import make_grpo_eval, make_score
from jaxtune.step import (
    TRANSFERS,
    clip,
    compiler_options,
    make_eval_step,
    make_train_step,
    neftune,
    targets,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_no_token_predicts_the_next_document():
    labels = jnp.array([[10, 11, 12, 20, 21, -100, 0, 0]])
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 0, 0]])
    want = [[11, 12, -100, 21, -100, -100, 0, -100]]
    np.testing.assert_array_equal(targets(labels, segments), want)


def test_noise_is_bounded_as_in_neftune():
    x = jnp.zeros((2, 50, 40))
    noise = neftune(x, 5.0, jax.random.split(jax.random.key(0), 2))
    bound = 5.0 / np.sqrt(50 * 40)
    assert np.abs(noise).max() <= bound and abs(np.asarray(noise).std() - bound / np.sqrt(3)) < 0.02 * bound


def test_clipping_is_torchs():
    import torch

    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}
    clipped, norm = clip(grads, 1.0)
    judge = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
    judge[0].grad, judge[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
    assert float(torch.nn.utils.clip_grad_norm_(judge, 1.0)) == float(norm) == 13
    np.testing.assert_allclose(clipped["a"], judge[0].grad, rtol=1e-6)
    assert clip(grads, 0)[0] is grads


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    base, _ = FastLanguageModel.from_pretrained(tiny_model_dir("llama"), dtype="float32", max_seq_length=None)
    return FastLanguageModel.get_peft_model(base, r=4, init_lora_weights=False)


def batch_of(lengths, width):
    """One row of documents of the given lengths, then padding."""
    rng = np.random.default_rng(0)
    ids, labels, positions, segments = (np.zeros((1, 1, width), np.int32) for _ in range(4))
    labels[:] = -100
    at = 0
    for number, length in enumerate(lengths, 1):
        where = np.s_[0, 0, at : at + length]
        ids[where] = labels[where] = rng.integers(3, 320, length)
        positions[where], segments[where] = np.arange(length), number
        at += length
    return {"input_ids": ids, "labels": labels, "positions": positions, "segment_ids": segments}


def test_packed_documents_are_those_alone(model):
    """A packed row's loss is the sum of its documents' own: attention and positions stay apart, padding is nothing."""
    evaluate = make_eval_step(model)
    packed = {k: v[0] for k, v in batch_of([9, 14, 5], 32).items()}
    together = evaluate(model.trainable, model.base, packed)
    total, at = 0.0, 0
    for length in (9, 14, 5):
        alone = {k: np.zeros((1, 32), np.int32) for k in packed}
        alone["labels"][:] = -100
        for key in packed:
            alone[key][0, :length] = packed[key][0, at : at + length]
        alone["segment_ids"][0, :length] = 1
        total += float(evaluate(model.trainable, model.base, alone)["loss_sum"])
        at += length
    np.testing.assert_allclose(together["loss_sum"], total, rtol=LOSS)
    assert together["num_items"] == 9 + 14 + 5 - 3


@pytest.mark.parametrize("remat", ["all", "attention+gate_up", "none"])
def test_accumulation_weighs_tokens_not_rows(model, remat):
    """Two micro-batches with few and many labels equal one batch of both; recomputation changes nothing."""
    few, many = batch_of([5], 32), batch_of([30], 32)
    optimizer = make_optimizer(SFTConfig(learning_rate=1e-3), 10, model.trainable)
    step = make_train_step(model, optimizer, remat=Remat.parse(remat))

    def run(batch):
        trainable = jax.tree.map(jnp.copy, model.trainable)
        return step(trainable, optimizer.init(trainable), model.base, batch, jax.random.key(0))

    split, _, split_metrics = run({k: np.concatenate([few[k], many[k]], 0) for k in few})
    whole, _, whole_metrics = run({k: np.concatenate([few[k], many[k]], 1) for k in few})
    np.testing.assert_allclose(split_metrics["loss"], whole_metrics["loss"], rtol=LOSS)
    np.testing.assert_allclose(split_metrics["grad_norm"], whole_metrics["grad_norm"], rtol=10 * LOSS)
    assert split_metrics["num_items"] == 4 + 29 and split_metrics["num_tokens"] == 35
    for path in split:
        np.testing.assert_allclose(split[path], whole[path], atol=1e-5)


def test_a_batch_without_labels_moves_nothing_but_decay(model):
    batch = batch_of([8], 16)
    batch["labels"][:] = -100
    optimizer = make_optimizer(SFTConfig(learning_rate=1e-3), 10, model.trainable)
    trainable = jax.tree.map(jnp.copy, model.trainable)
    step = make_train_step(model, optimizer)
    after, _, metrics = step(trainable, optimizer.init(trainable), model.base, batch, jax.random.key(0))
    assert metrics["loss"] == 0 and metrics["num_items"] == 0
    assert all((after[path] == model.trainable[path]).all() for path in after)


def _module(width: int):
    config = LlamaConfig(
        hidden_size=width, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, vocab_size=64,
    )  # fmt: skip
    return models.build(config, jnp.float32, nf4=True)


def test_options_of_the_compiler():
    """None on a CPU; products that can write into stacks, none tried out beside the weights; nothing computed again but
    by `remat`; what makes copies to the host run beside the products."""
    module = _module(128)
    assert compiler_options(module, Remat.parse("all")) is None
    with target.tracing_for((9, 0)):
        plain, offload = (compiler_options(module, Remat.parse(name)) for name in ("all", "all+offload"))
    assert plain is not None and offload is not None
    assert plain["xla_gpu_enable_triton_gemm"] is False and plain["xla_gpu_autotune_level"] == 0
    assert plain["xla_disable_hlo_passes"] == "rematerialization"
    assert dict(offload.items() - plain.items()) == {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_pgle_profile_file_or_directory_path": str(TRANSFERS),
        "xla_gpu_pgle_accuracy_checker": "PGLE_STRICTNESS_LEVEL_OFF",
        "xla_gpu_enable_pipelined_host_offloading": True,
        "xla_disable_hlo_passes": "rematerialization,dynamic-slice-copy-fusion-async-wrapper,"
        "collective-pipeliner-forward",
        "xla_gpu_enable_command_buffer": "",
    }


def test_kernels_of_a_narrow_model_run_beside_each_other_where_memory_is_free():
    def option(width, remat, layout=ONE_DEVICE):
        options = compiler_options(_module(width), Remat.parse(remat), layout)
        assert options is not None
        return options.get("xla_gpu_command_buffer_scheduling_mode")

    two = Layout(AbstractMesh((2, 1), AXES))  # pyrefly: ignore
    with target.tracing_for((9, 0)):
        assert option(128, "none") == option(2048, "none") == "CONCURRENT"
        assert option(2176, "none") is option(128, "all") is option(128, "none+offload") is None
        assert option(128, "none", two) is None


def test_programs_without_a_backward_pass_have_the_options_of_a_step(model, monkeypatch):
    seen = []
    monkeypatch.setattr(jax, "jit", lambda _, **how: seen.append(how["compiler_options"]))
    with target.tracing_for((9, 0)):
        make_train_step(model, optax.sgd(1.0))
        make_eval_step(model)
        make_score(model, 1.0)
        make_grpo_eval(model, GRPOLossOptions(), temperature=1.0)
        make_dpo_eval(model, DPOLossOptions())
        make_pair_log_probs(model, DPOLossOptions())
        want = compiler_options(model.module, Remat())
    assert want is not None and seen == [want] * 6


@pytest.mark.parametrize("capability", [(7, 5), (8, 6), (12, 0)])
def test_a_step_of_packed_rows_is_lowered_for_gpus_of_any_age(capability, tiny_model_dir):
    """A T4 has no products of bfloat16: nothing may ask for them by name. None of the three has Hopper's kernels."""
    base, _ = FastLanguageModel.from_pretrained(
        tiny_model_dir("llama"), dtype="bfloat16", max_seq_length=None
    )
    model = FastLanguageModel.get_peft_model(base, r=4)
    batch = batch_of([20, 30], 64) | {"starts": np.array([[[0, 20]]], np.int32)}
    optimizer = optax.sgd(1.0)
    state = optimizer.init(model.trainable)
    with target.tracing_for(capability):
        traced = make_train_step(model, optimizer).trace(
            model.trainable, state, model.base, batch, jax.random.key(0)
        )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" not in text and ("algorithm = " in text) == (capability == (8, 6))
    assert ("__cudnn$fmha" in text) == (capability == (12, 0))


def test_transfers_are_scheduled_from_a_file():
    """It is there, and names instructions as XLA does; codes of a layer and their scales are gathered together."""
    layout = Layout(AbstractMesh((1, 2), AXES))  # pyrefly: ignore
    module = _module(128)
    weights = 128 * (128 + 2 * 64 + 128) + 3 * 128 * 256
    with target.tracing_for((9, 0)):
        options = compiler_options(module, Remat.parse("all"), layout)
    assert options is not None
    assert options["xla_gpu_all_gather_combine_threshold_bytes"] == weights // 2 + weights // 64
    lines = Path(str(options["xla_gpu_pgle_profile_file_or_directory_path"])).read_text().splitlines()
    for name in (
        "all-gather-start",
        "all-gather-start.9",
        "dynamic-slice-start.1.0",
        "dynamic-slice-start.6",
    ):
        assert f'costs {{ name: "{name}" cost_us: 30000 }}' in lines
