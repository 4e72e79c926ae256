"""Gemma 3, Idefics3 and SmolVLM with images against transformers, float32: several sizes and rows, several in a row."""

import copy
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import tiny_siglip
import torch
from safetensors.numpy import load_file, save_file
from tolerances import LOGITS, LOSS, MERGED, VISION_GRADIENT
from transformers import AutoModelForImageTextToText

from jaxtune import images, lora, models
from jaxtune.fast import FastVisionModel
from jaxtune.models.names import hf_weights
from jaxtune.models.remat import Remat
from jaxtune.step import make_train_step

LOAD = {"dtype": "float32", "max_seq_length": None}


@pytest.fixture(scope="module", params=["gemma3", "smolvlm"])
def both(request, tmp_path_factory):
    return load_both(request.param, tmp_path_factory.mktemp(request.param))


def load_both(family, folder, **changes):
    """(jaxtune's model, its processor, transformers' model, the processor's output for two rows, the folder)."""
    config = tiny_siglip.make_config(family, **changes)
    tiny_siglip.save(tiny_siglip.make_model(config), folder)
    model, processor = FastVisionModel.from_pretrained(folder, load_in_4bit=False, **LOAD)
    judge = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    return model, processor, judge, tiny_siglip.rows(processor, family), folder


def logits_of(judge, inputs):
    return judge(**{name: torch.tensor(value) for name, value in inputs.items()}).logits


def largest_error(got, want, mask) -> float:
    got, want = np.asarray(got)[mask == 1], want.detach().numpy()[mask == 1]
    return float(np.abs(got - want).max() / np.abs(want).max())


def check_logits(model, judge, inputs):
    with torch.no_grad():
        want = logits_of(judge, inputs)
    assert largest_error(model.logits(**inputs), want, inputs["attention_mask"]) <= LOGITS


def test_logits(both):
    model, _, judge, inputs, _ = both
    check_logits(model, judge, inputs)


def test_idefics3(tmp_path):
    model, _, judge, inputs, _ = load_both("idefics3", tmp_path, tie_word_embeddings=True)
    assert model.module.lm_head is None
    check_logits(model, judge, inputs)


def test_logits_of_text_alone(both):
    model, _, judge, *_ = both
    ids = np.random.default_rng(0).integers(3, 259, (2, 40))
    mask = np.ones_like(ids)
    mask[1, :6] = 0
    with torch.no_grad():
        want = judge(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
    assert largest_error(model.logits(ids, mask), want, mask) <= LOGITS


@pytest.mark.parametrize("prefix", [{}, {"vision_tower.": "vision_tower.vision_model."}])
def test_published_names_and_those_of_transformers_modules_load(both, tmp_path, prefix):
    model, _, judge, _, folder = both
    own = shutil.copytree(folder, tmp_path / "own")
    names = {name: value.detach().numpy() for name, value in judge.named_parameters()}
    if prefix:
        names = load_file(folder / "model.safetensors")
        for old, new in prefix.items():
            names = {name.replace(old, new): value for name, value in names.items()}
    save_file(names, own / "model.safetensors", {"format": "pt"})
    again, _ = FastVisionModel.from_pretrained(own, load_in_4bit=False, **LOAD)
    for path, leaf in model.base.items():
        np.testing.assert_array_equal(again.base[path], leaf)


def test_what_is_quantised(both):
    """Unsloth's rule: what joins tower and decoder stays in 16 bits, and what is called vision_tower, as Gemma's."""
    _, _, judge, inputs, folder = both
    model, _ = FastVisionModel.from_pretrained(folder, **LOAD)
    names = [name for name, slot in model.slots.items() if f"{slot.path}.weight.codes" in model.base]
    tower = {name.rpartition("layers.0.")[2] for name in names if "encoder.layers.0." in name}
    # fc2 has rows of 96, which are no whole blocks
    wanted = set() if model.config.model_type == "gemma3" else {"mlp.fc1"}
    wanted |= {f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")} if wanted else set()
    assert tower == wanted and not [name for name in names if "projection" in name or "lm_head" in name]
    assert sum(".mlp.gate_proj" in name for name in names) == len(model.module.config.windows)
    same = copy.deepcopy(judge)
    stored = {name: torch.tensor(w) for name, w in hf_weights(model)}
    if model.config.model_type == "gemma3":
        projection = "model.multi_modal_projector.mm_input_projection"
        stored[f"{projection}_weight"] = stored.pop(f"{projection}.weight")
    same.load_state_dict(judge.state_dict() | stored)
    check_logits(model, same, inputs)


@pytest.fixture(scope="module")
def adapted(both):
    """jaxtune's model with adapters on everything, none of them zero, and the same of PEFT on transformers'."""
    model, _, judge, *_ = both
    model = FastVisionModel.get_peft_model(model, r=4, lora_alpha=8, init_lora_weights=False)
    fields = lora.config_to_peft(model.lora, "base")
    config = peft.LoraConfig(**{k: fields[k] for k in ("r", "lora_alpha", "target_modules")})
    theirs = peft.get_peft_model(copy.deepcopy(judge), config)
    tensors = {name: torch.tensor(value) for name, value in lora.adapter_tensors(model).items()}
    left = peft.set_peft_model_state_dict(theirs, tensors)
    assert not left.unexpected_keys
    return model, theirs


def test_a_step_of_training(both, adapted):
    """Loss and gradients of every adapter of tower and decoder, both rows and their images in one micro-batch."""
    inputs = both[3]
    model, theirs = adapted
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    labels = np.where((mask == 1) & (np.roll(mask, 1, 1) == 1) & (ids < 259), ids, -100)
    logits = logits_of(theirs, inputs)
    want = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), torch.tensor(labels[:, 1:]).flatten()
    )
    want.backward()
    family = images.family(model.config)
    batch = {
        "input_ids": ids.astype(np.int32),
        "labels": labels.astype(np.int32),
        "segment_ids": mask.astype(np.int32),
        "positions": np.maximum(np.cumsum(mask, 1) - 1, 0).astype(np.int32),
    }
    # one image more than there are: padding
    rows = family.rows({k: inputs[k] for k in family.processor_keys}, list(ids))
    batch |= images.batch_arrays(family, ids, mask, rows, lambda sizes: {"images": sizes["images"] + 1})
    zeros = partial(jax.tree.map, jnp.zeros_like)
    keeper = optax.GradientTransformation(zeros, lambda grads, state, params: (zeros(grads), grads))
    step = make_train_step(model, keeper, max_grad_norm=None, remat=Remat.parse("attention"))
    copies = jax.tree.map(jnp.copy, model.trainable)
    micro = jax.tree.map(lambda x: x[None], batch)
    _, grads, metrics = step(copies, zeros(copies), model.base, micro, jax.random.key(0))
    assert abs(float(metrics["loss"]) - want.item()) <= LOSS * want.item()
    held = copy.copy(model)
    held.trainable = grads
    judged = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    found = lora.adapter_tensors(held)
    assert found.keys() == judged.keys() and any("vision" in name for name in found)
    for name, value in found.items():
        assert np.abs(value - judged[name]).max() <= VISION_GRADIENT * np.abs(judged[name]).max(), name


def test_a_merged_model_is_loaded_by_transformers(both, adapted, tmp_path):
    _, processor, _, inputs, folder = both
    model, theirs = adapted
    model.save_pretrained_merged(tmp_path / "merged", processor, dtype="float32", progress=False)
    stored = load_file(tmp_path / "merged/model.safetensors")
    assert stored.keys() == load_file(folder / "model.safetensors").keys()
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        want, got = logits_of(theirs, inputs), logits_of(merged, inputs)
    assert largest_error(got, want, inputs["attention_mask"]) <= MERGED


def test_greedy_generation(both):
    """32 tokens of two rows, one with three images, left-padded."""
    model, _, judge, inputs, _ = both
    options = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        want = judge.generate(
            **{name: torch.tensor(value) for name, value in inputs.items()}, **options, eos_token_id=None
        )
    got = model.generate(**inputs, **options | {"eos_token_id": []})
    np.testing.assert_array_equal(got, want.numpy())


UNSUPPORTED = [
    ("gemma3", {"vision_config": {"vision_use_head": True}}, "vision_use_head=True"),
    ("gemma3", {"mm_tokens_per_image": 16}, "mm_tokens_per_image=16"),
    ("smolvlm", {"scale_factor": 4}, "scale_factor=4 does not divide the 6 patches"),
    ("idefics3", {"text_config": {"model_type": "mistral"}}, "model_type='mistral'"),
    ("gemma3", {"vision_config": {"attention_dropout": 0.5}}, r"vision_config\.attention_dropout=0\.5"),
]


@pytest.mark.parametrize("family, changes, message", UNSUPPORTED)
def test_unsupported_config_fields_raise(family, changes, message):
    fields = tiny_siglip.make_config(family).to_dict()
    for name, value in changes.items():
        fields[name] = fields[name] | value if isinstance(value, dict) else value
    config = type(tiny_siglip.make_config(family)).from_dict(fields)
    with pytest.raises(ValueError, match=message):
        models.build(config)
