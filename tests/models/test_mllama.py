"""Llama 3.2 Vision against transformers, float32.

transformers lets a token that stands before all images see whatever pads its row's images to those of the batch; here
a row does not depend on what is beside it. So rows are judged one by one.
"""

import copy
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import tiny_mllama
import torch
from safetensors.numpy import load_file, save_file
from tolerances import LOGITS, LOSS, MERGED, SAMPLED_LOGPROBS, VISION_GRADIENT
from transformers import AutoModelForImageTextToText

from jaxtune import images, lora, models
from jaxtune.fast import FastVisionModel
from jaxtune.generate import Engine
from jaxtune.models.remat import Remat
from jaxtune.step import make_train_step

LOAD = {"dtype": "float32", "max_seq_length": None}
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = tiny_mllama.make_model(tiny_mllama.make_config())
    return tiny_mllama.save(model, tmp_path_factory.mktemp("mllama"))


@pytest.fixture(scope="module")
def model(folder):
    return FastVisionModel.from_pretrained(folder, load_in_4bit=False, **LOAD)[0]


@pytest.fixture(scope="module")
def judge(folder):
    kind = AutoModelForImageTextToText
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def rows(model):
    return tiny_mllama.rows(model.processor)


def logits_of(judge, row):
    return judge(**{name: torch.tensor(value) for name, value in row.items()}).logits[0]


@pytest.fixture(scope="module")
def wanted(judge, rows):
    with torch.no_grad():
        return [logits_of(judge, row).numpy() for row in rows]


def check(got, want, tolerance=LOGITS):
    assert np.abs(np.asarray(got) - want).max() <= tolerance * np.abs(want).max()


def together(rows) -> dict[str, np.ndarray]:
    """Rows padded on the left, and images behind those of a row, as the processor does it for a batch."""
    width = max(row["input_ids"].shape[1] for row in rows)
    most = max(row["pixel_values"].shape[1] if "pixel_values" in row else 0 for row in rows)
    whole = next(row for row in rows if "pixel_values" in row)

    def left(row, name):
        return np.pad(row[name], ((0, 0), (width - row[name].shape[1], 0)))

    def behind(row, name):
        value = row.get(name, np.zeros((1, 0, *whole[name].shape[2:]), whole[name].dtype))
        return np.pad(value, [(0, 0), (0, most - value.shape[1])] + [(0, 0)] * (value.ndim - 2))

    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    made = {
        name: np.concatenate([left(row, name) for row in rows]) for name in ("input_ids", "attention_mask")
    }
    return made | {name: np.concatenate([behind(row, name) for row in rows]) for name in names}


def test_the_layers_that_attend_to_images_are_stacked(model):
    assert [(s.period, s.repeats) for s in model.module.plan] == [(2, 2), (1, 1)]


def test_logits_of_text_alone(model, rows, wanted):
    check(model.logits(**rows[3])[0], wanted[3])


def test_logits_of_rows_together(model, rows, wanted):
    got = np.asarray(model.logits(**together(rows)))
    for one, want in zip(got, wanted, strict=True):
        check(one[-len(want) :], want)


def test_logits_of_rows_packed(model, rows, wanted):
    """A document sees its own images only."""
    ids = np.concatenate([row["input_ids"] for row in rows], 1)
    lengths = [row["input_ids"].shape[1] for row in rows]
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    packed = {name: np.concatenate([row[name] for row in rows[:3]], 1) for name in names}
    segments = np.repeat(np.arange(1, 5), lengths)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    got = np.asarray(model.logits(ids, positions=positions, segment_ids=jnp.asarray(segments), **packed))[0]
    for one, want in zip(np.split(got, np.cumsum(lengths)[:-1]), wanted, strict=True):
        check(one, want)


def test_names_of_transformers_modules_load_too(folder, model, judge, tmp_path):
    tiny_mllama.save(judge, tmp_path)
    names = {name: value.detach().numpy() for name, value in judge.named_parameters()}
    assert names.keys() != load_file(folder / "model.safetensors").keys()
    save_file(names, tmp_path / "model.safetensors", {"format": "pt"})
    again, _ = FastVisionModel.from_pretrained(tmp_path, load_in_4bit=False, **LOAD)
    for path, leaf in model.base.items():
        np.testing.assert_array_equal(again.base[path], leaf)


@pytest.fixture(scope="module")
def adapted(model, judge):
    """jaxtune's model with adapters on everything, none of them zero, and the same of PEFT on transformers'."""
    model = FastVisionModel.get_peft_model(model, r=4, lora_alpha=8, init_lora_weights=False)
    fields = lora.config_to_peft(model.lora, "base")
    config = peft.LoraConfig(**{k: fields[k] for k in ("r", "lora_alpha", "target_modules")})
    theirs = peft.get_peft_model(copy.deepcopy(judge), config)
    tensors = {name: torch.tensor(value) for name, value in lora.adapter_tensors(model).items()}
    left = peft.set_peft_model_state_dict(theirs, tensors)
    assert not left.unexpected_keys
    return model, theirs


def test_a_step_of_training(adapted, rows):
    """Loss and gradients of every adapter of tower and decoder, four rows in one micro-batch."""
    model, theirs = adapted
    losses = []
    for row in rows:
        ids = torch.tensor(row["input_ids"][0, 1:])
        labels = torch.where(ids < 259, ids, -100)
        losses.append(
            torch.nn.functional.cross_entropy(logits_of(theirs, row)[:-1], labels, reduction="none")
        )
    want = torch.cat(losses).sum() / sum(int((row["input_ids"][0, 1:] < 259).sum()) for row in rows)
    want.backward()
    inputs = together(rows)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    batch = {
        "input_ids": ids.astype(np.int32),
        "labels": np.where((mask == 1) & (ids < 259), ids, -100).astype(np.int32),
        "segment_ids": mask.astype(np.int32),
        "positions": np.maximum(np.cumsum(mask, 1) - 1, 0).astype(np.int32),
    }
    family = images.family(model.config)
    seen = family.rows({k: inputs[k] for k in family.processor_keys}, list(ids))
    batch |= images.batch_arrays(family, ids, mask, seen, lambda sizes: {"images": sizes["images"] + 1})
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
        n.replace(".default", ""): p.grad.numpy() for n, p in theirs.named_parameters() if p.requires_grad
    }
    found = lora.adapter_tensors(held)
    assert found.keys() == judged.keys()
    for part in ("global_transformer", "cross_attn.k_proj", "language_model.layers.1.mlp.up_proj"):
        assert any(part in name for name in found)
    for name, value in found.items():
        assert np.abs(value - judged[name]).max() <= VISION_GRADIENT * np.abs(judged[name]).max(), name


def test_a_merged_model_is_loaded_by_transformers(adapted, rows, folder, tmp_path):
    model, theirs = adapted
    model.save_pretrained_merged(tmp_path / "merged", model.processor, dtype="float32", progress=False)
    stored = load_file(tmp_path / "merged/model.safetensors")
    assert stored.keys() == load_file(folder / "model.safetensors").keys()
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        want, got = (logits_of(m, rows[0]).numpy() for m in (theirs, merged))
    check(got, want, MERGED)


def test_what_is_quantised(folder):
    """The decoder's layers, also those that attend to images, but not the projector; and of the tower what has rows of
    whole blocks: here nothing."""
    loaded, _ = FastVisionModel.from_pretrained(folder, **LOAD)
    names = [name for name, slot in loaded.slots.items() if f"{slot.path}.weight.codes" in loaded.base]
    assert len(names) == 5 * 7 and all(name.startswith("model.language_model.layers.") for name in names)


def test_gguf_is_refused(model, tmp_path):
    with pytest.raises(
        ValueError, match=r"mllama cannot be saved as GGUF: llama\.cpp has no such architecture"
    ):
        model.save_pretrained_gguf(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def greedy(judge, row):
    """32 tokens of transformers'."""
    with torch.no_grad():
        made = judge.generate(
            **{name: torch.tensor(value) for name, value in row.items()},
            max_new_tokens=32,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
    return made[0, row["input_ids"].shape[1] :].numpy()


def test_greedy_generation(model, judge, rows):
    """All rows at once, one of them without an image; each as transformers continues it alone."""
    whole = together(rows)
    got = model.generate(**whole, max_new_tokens=32, pad_token_id=0, eos_token_id=[])
    for row, one in zip(rows, got[:, whole["input_ids"].shape[1] :], strict=True):
        np.testing.assert_array_equal(one, greedy(judge, row))


def test_generation_with_stored_weights_and_an_adapter(folder, rows):
    """NF4; several answers to a prompt, text without images beside it."""
    loaded, _ = FastVisionModel.from_pretrained(folder, **LOAD)
    loaded = FastVisionModel.get_peft_model(loaded, r=4, init_lora_weights=False)
    family = images.family(loaded.config)
    prompts = [rows[i]["input_ids"][0].tolist() for i in (0, 3)]
    seen = [family.rows({k: rows[0][k] for k in family.processor_keys}, [np.array(prompts[0])])[0], {}]
    options = {"images": seen, "max_new_tokens": 4, "n": 2, "stop_token_ids": []}
    answers = [
        Engine(loaded, weights=kind, progress=False).generate(prompts, **options)
        for kind in ("lora", "merged")
    ]
    for one, other in zip(*answers, strict=True):
        assert list(one.token_ids) == list(other.token_ids)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=SAMPLED_LOGPROBS)


UNSUPPORTED = [
    ({"text_config": {"tie_word_embeddings": True}}, "tie_word_embeddings=True"),
    ({"text_config": {"dropout": 0.5}}, r"text_config\.dropout=0\.5"),
    ({"vision_config": {"vision_output_dim": 64}}, "vision_output_dim=64: expected 96"),
    ({"vision_config": {"intermediate_layers_indices": [1, 0]}}, r"\[1, 0\]: expected rising numbers"),
    ({"vision_config": {"hidden_act": "tanh"}}, "hidden_act='tanh'"),
]


@pytest.mark.parametrize("changes, message", UNSUPPORTED)
def test_unsupported_config_fields_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        models.build(tiny_mllama.make_config(**changes))


def test_errors_of_images(model, rows):
    few = rows[0] | {"aspect_ratio_ids": rows[0]["aspect_ratio_ids"] * np.array([[1, 1, 0]])}
    with pytest.raises(ValueError, match="row 0: 2 images were given, and its text holds 3"):
        model.logits(**few)
    with pytest.raises(ValueError, match=r"the model takes \[4, 3, 24, 24\]"):
        model.logits(**rows[0] | {"pixel_values": rows[0]["pixel_values"][..., :12]})
