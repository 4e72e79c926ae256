"""Loading: what is missing or left over is named, and memory stays at the finished model plus what is under way."""

import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tolerances import LOGITS
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from jaxtune import hub, load, models
from jaxtune.fast import FastLanguageModel

pytestmark = pytest.mark.usefixtures("quick_compilation")


def changed(tiny_model_dir, tmp_path, change):
    import shutil

    folder = shutil.copytree(tiny_model_dir("llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_missing_and_unused_tensors_are_named(tiny_model_dir, tmp_path):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.1.mlp.extra.weight"] = torch.zeros(2)

    with pytest.raises(ValueError, match=r"missing: \S+1.mlp.up_proj.weight.*unused: \S+1.mlp.extra.weight"):
        FastLanguageModel.from_pretrained(changed(tiny_model_dir, tmp_path, change))


def test_wrong_shapes_are_named(tiny_model_dir, tmp_path):
    def change(tensors):
        tensors["model.norm.weight"] = torch.zeros(7)

    with pytest.raises(ValueError, match=r"model.norm.weight: .*\[128\].*\[7\]"):
        FastLanguageModel.from_pretrained(changed(tiny_model_dir, tmp_path, change))


def test_rows_that_are_no_whole_blocks_cannot_be_quantised(tiny_model_dir):
    folder = tiny_model_dir("llama", intermediate_size=100)
    with pytest.raises(ValueError, match=r"multiple of 64.*load_in_16bit"):
        FastLanguageModel.from_pretrained(folder)
    FastLanguageModel.from_pretrained(folder, load_in_16bit=True)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("skip", [[], ["lm_head", "model.layers.0.self_attn.o_proj"]])
def test_bitsandbytes_folder_gives_its_logits(double_quant, skip, tiny_model_dir, tmp_path):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=skip or None,
    )
    judge = AutoModelForCausalLM.from_pretrained(
        tiny_model_dir("llama"), dtype=torch.float32, quantization_config=quantization, device_map="cpu"
    ).eval()
    judge.save_pretrained(tmp_path)
    tiny_models.make_tokenizer().save_pretrained(tmp_path)
    model, _ = FastLanguageModel.from_pretrained(tmp_path, dtype="float32", max_seq_length=None)
    assert len(model.module.plan) == (2 if skip else 1)
    ids = np.random.default_rng(0).integers(3, 320, (2, 24))
    judge.train()  # in eval mode bitsandbytes' CPU path rounds to bfloat16
    want = judge(torch.tensor(ids)).logits.detach().numpy()
    got = np.asarray(model.logits(ids))
    assert np.abs(got - want).max() <= LOGITS * np.abs(want).max()


def test_only_one_of_the_modes(tiny_model_dir):
    with pytest.raises(ValueError, match="load_in_4bit and load_in_16bit exclude each other"):
        FastLanguageModel.from_pretrained(tiny_model_dir("llama"), load_in_4bit=True, load_in_16bit=True)


def loaded(folder, ahead):
    checkpoint = hub.resolve(str(folder))
    return load.load_weights(checkpoint, models.build(checkpoint.config, jnp.bfloat16, nf4=True), ahead=ahead)


@pytest.mark.parametrize("family", ["llama_tied", "llama_bias", "mistral_window"])
def test_tensors_under_way_together_give_the_same_leaves(family, tiny_model_dir):
    one, four = (loaded(tiny_model_dir(family), ahead) for ahead in (1, 4))
    assert one.keys() == four.keys()
    for path, leaf in one.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(four[path]), err_msg=path)


@pytest.mark.parametrize("layers", [2, 5])
def test_one_program_writes_all_weights_of_a_shape(layers, tiny_model_dir):
    load._write.clear_cache()
    loaded(tiny_model_dir("llama", num_hidden_layers=layers), 4)
    assert load._write._cache_size() == 5  # q and o, k and v, gate and up, down, norms


def test_no_leaf_shares_the_memory_of_the_file(tiny_model_dir):
    read, checkpoint = [], hub.resolve(str(tiny_model_dir("llama")))

    def remembered(name):
        read.append(hub.Checkpoint.read(checkpoint, name))
        return read[-1]

    object.__setattr__(checkpoint, "read", remembered)
    leaves = load.load_weights(checkpoint, models.build(checkpoint.config, jnp.float32, nf4=False))
    inside = [value.ctypes.data + at for value in read for at in range(0, value.nbytes, 64)]
    assert not {leaf.unsafe_buffer_pointer() for leaf in leaves.values()} & set(inside)


def test_no_more_are_begun_than_asked_for_and_they_come_in_order():
    begun, lock, together = [], threading.Lock(), [0]

    def call(i):
        with lock:
            begun.append(i)
            together[0] = max(together[0], len(begun) - taken)
        time.sleep(0.001 * (i % 3))
        return i

    taken, results = 0, []
    for result in load.in_order(call, ((i,) for i in range(20)), 3):
        taken += 1
        results.append(result)
    assert results == list(range(20))
    assert together[0] <= 3 + 1  # the one that is being taken has made room for the next


def test_what_goes_wrong_in_a_tensor_under_way_is_raised():
    def call(i):
        if i == 5:
            raise ValueError("tensor 5")
        return i

    with pytest.raises(ValueError, match="tensor 5"):
        list(load.in_order(call, ((i,) for i in range(20)), 3))


PEAK = """
import resource, sys
import numpy as np
import jax.numpy as jnp
from jaxtune import hub, load, models
from jaxtune.fast import FastLanguageModel
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
warm, _ = FastLanguageModel.from_pretrained(sys.argv[1], dtype="bfloat16", max_seq_length=None)
before = peak()
model, _ = FastLanguageModel.from_pretrained(sys.argv[2], dtype="bfloat16", max_seq_length=None)
print(peak() - before, model.memory_bytes())
"""


@pytest.mark.slow
def test_peak_memory_is_the_model_and_a_tensor(tiny_model_dir, tmp_path):
    """A model of 310 MB in bfloat16, 85 MB finished: the 16-bit whole would show."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 9, "head_dim": 256}
    config = tiny_models.make_config("llama", **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    stored = sum(p.numel() * 2 for p in model.parameters())
    largest = max(p.numel() for p in model.parameters()) * 2
    folder = tmp_path / "big"
    model.save_pretrained(folder, max_shard_size="60MB")
    tiny_models.make_tokenizer().save_pretrained(folder)
    del model
    out = subprocess.run(
        [sys.executable, "-c", PEAK, tiny_model_dir("llama"), folder],
        capture_output=True,
        text=True,
        check=True,
    )
    grown, finished = map(int, out.stdout.split())
    assert finished < 0.32 * stored
    # one tensor: its 16-bit copy on the device, in float32 while it is quantised, and its pages of the file
    assert grown < finished + 6 * largest, f"{grown / 1e6:.0f} MB over {finished / 1e6:.0f} MB"
