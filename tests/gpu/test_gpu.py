"""On an NVIDIA GPU (`pytest -m gpu`): the same judges, run there."""

import jax
import numpy as np
import pytest
import torch
from gpu_checks import fresh_seed
from tolerances import GPU_LOGITS
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from jaxtune import quant
from jaxtune.config import SFTConfig
from jaxtune.fast import FastLanguageModel
from jaxtune.optim import make_optimizer
from jaxtune.step import make_eval_step, make_train_step

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def exact_matmuls():
    """float32 products in float32, not TF32, in both libraries."""
    torch.backends.cuda.matmul.allow_tf32 = False
    with jax.default_matmul_precision("highest"):
        yield


def relative_error(got, want) -> float:
    want = want.detach().float().cpu().numpy()
    return float(np.abs(np.asarray(got) - want).max() / np.abs(want).max())


def test_nf4_bytes_are_those_of_the_cuda_kernel():
    import bitsandbytes.functional as bnb

    w = torch.randn(512, 1536, generator=torch.Generator().manual_seed(fresh_seed())) * 0.05
    packed, state = bnb.quantize_4bit(w.to(DEVICE), quant_type="nf4", compress_statistics=False)
    ours = quant.to_bnb(quant.quantize_nf4(w.numpy(), double_quant=False), dtype="float32")
    np.testing.assert_array_equal(ours["weight.absmax"], state.absmax.cpu().numpy())
    differing = float((ours["weight"] != packed.cpu().numpy()).mean())
    assert differing < 1e-5, f"{differing:.2e} of the code bytes differ from the CUDA kernel's"


def test_smollm2_logits_and_greedy_generation(smollm2_dir):
    model, tokenizer = FastLanguageModel.from_pretrained(smollm2_dir, load_in_4bit=False, dtype="float32")
    judge = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).to(DEVICE).eval()
    chat = [{"role": "user", "content": "Write a Python function that adds two numbers."}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert relative_error(model.logits(ids), judge(ids.to(DEVICE)).logits) <= GPU_LOGITS
        want = judge.generate(
            ids.to(DEVICE), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    np.testing.assert_array_equal(model.generate(ids, max_new_tokens=64, eos_token_id=[]), want.cpu().numpy())


def test_nf4_logits_are_those_of_bitsandbytes(smollm2_dir, tmp_path):
    """A checkpoint that bitsandbytes quantised on this GPU, both in float32."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    judge = AutoModelForCausalLM.from_pretrained(
        smollm2_dir, dtype=torch.float32, quantization_config=quantization, device_map={"": DEVICE}
    )
    judge.train()  # the matrix product, not the kernel for single tokens
    judge.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(smollm2_dir).save_pretrained(tmp_path)
    model, _ = FastLanguageModel.from_pretrained(tmp_path, dtype="float32")
    ids = torch.randint(3, 49152, (2, 64), generator=torch.Generator().manual_seed(fresh_seed()))
    assert relative_error(model.logits(ids), judge(ids.to(DEVICE)).logits) <= GPU_LOGITS


def test_a_packed_bfloat16_step_learns_and_compiles_once(smollm2_dir):
    model, _ = FastLanguageModel.from_pretrained(smollm2_dir)
    model = FastLanguageModel.get_peft_model(model)
    optimizer = make_optimizer(SFTConfig(learning_rate=1e-3, optim="adamw_8bit"), 30, model.trainable)
    step = make_train_step(model, optimizer)
    ids = np.random.default_rng(fresh_seed()).integers(0, 49152, (2, 2, 512)).astype(np.int32)
    documents = np.repeat(np.arange(1, 5, dtype=np.int32), 128)
    batch = {
        "input_ids": ids,
        "labels": ids,
        "positions": np.broadcast_to(np.tile(np.arange(128, dtype=np.int32), 4), ids.shape),
        "segment_ids": np.broadcast_to(documents, ids.shape),
        "starts": np.broadcast_to(np.arange(4, dtype=np.int32) * 128, (2, 2, 4)),
    }
    micro = {name: column[0] for name, column in batch.items()}
    evaluate = make_eval_step(model)
    fused = evaluate(model.trainable, model.base, micro)["loss_sum"]
    del micro["starts"]  # then masks say who sees whom
    masked = evaluate(model.trainable, model.base, micro)["loss_sum"]
    assert abs(fused - masked) <= 1e-3 * abs(masked)
    trainable, state, losses = model.trainable, optimizer.init(model.trainable), []
    for n in range(30):
        trainable, state, metrics = step(trainable, state, model.base, batch, jax.random.key(n))
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and losses[-1] < 0.8 * losses[0]
    assert step._cache_size() == 1
