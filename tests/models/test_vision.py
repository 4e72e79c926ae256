"""Vision-language models against transformers, float32: images of several sizes, several in a row, padded rows."""

import copy
import json
import re
import shutil
from functools import partial

import bitsandbytes as bnb
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import tiny_vision
import torch
from safetensors.numpy import load_file, save_file
from tolerances import LOGITS, LOSS, MERGED, VISION_GRADIENT
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from jaxtune import hub, images, lora
from jaxtune.fast import FastLanguageModel, FastVisionModel
from jaxtune.models.names import hf_weights
from jaxtune.models.remat import Remat
from jaxtune.step import make_eval_step, make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

FAMILIES = ["qwen2_5_vl", "qwen3_vl"]
# Linear layers of a tower's block that are stored in NF4, of the tiny models.
QUANTISED = {
    "qwen2_5_vl": ["blocks.attn.qkv", "blocks.attn.proj", "blocks.mlp.gate_proj", "blocks.mlp.up_proj"],
    "qwen3_vl": [
        *("blocks.attn.qkv", "blocks.attn.proj", "blocks.mlp.linear_fc1"),
        *("deepstack_merger_list.linear_fc1", "deepstack_merger_list.linear_fc2"),
    ],
}


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory):
    """(jaxtune's model, its processor, transformers' model, the processor's output for two rows, the folder)."""
    config = tiny_vision.make_config(request.param)
    folder = tiny_vision.save(tiny_vision.make_model(config), tmp_path_factory.mktemp(request.param))
    model, processor = FastVisionModel.from_pretrained(
        folder, load_in_4bit=False, dtype="float32", max_seq_length=None
    )
    judge = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    return model, processor, judge, tiny_vision.rows(processor), folder


def as_torch(inputs):
    return {name: torch.tensor(value) for name, value in inputs.items()}


def largest_error(got, want, mask) -> float:
    got, want = np.asarray(got)[mask == 1], want.detach().numpy()[mask == 1]
    return float(np.abs(got - want).max() / np.abs(want).max())


def test_logits(both):
    model, _, judge, inputs, _ = both
    assert len(inputs["image_grid_thw"]) == 4 and len({tuple(g) for g in inputs["image_grid_thw"]}) == 4
    with torch.no_grad():
        want = judge(**as_torch(inputs)).logits
    got = model.logits(**inputs)
    assert largest_error(got, want, inputs["attention_mask"]) <= LOGITS


def test_logits_of_text_alone(both):
    model, _, judge, *_ = both
    ids = np.random.default_rng(0).integers(3, 259, (2, 20))
    mask = np.ones_like(ids)
    mask[1, :6] = 0
    with torch.no_grad():
        want = judge(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
    assert largest_error(model.logits(ids, mask), want, mask) <= LOGITS


def test_names_of_transformers_modules_load_too(both, tmp_path):
    """Published checkpoints, and what transformers saves, have other names than its modules: both are read."""
    model, _, judge, _, folder = both
    own = shutil.copytree(folder, tmp_path / "own")
    stored = load_file(folder / "model.safetensors")
    names = {
        name: value.numpy()
        for name, value in judge.state_dict().items()
        if name in dict(judge.named_parameters())
    }
    assert model.config.model_type != "qwen2_5_vl" or not stored.keys() & {n for n in names if "visual" in n}
    save_file(names, own / "model.safetensors", {"format": "pt"})
    again, _ = FastVisionModel.from_pretrained(own, load_in_4bit=False, dtype="float32", max_seq_length=None)
    for path, leaf in model.base.items():
        np.testing.assert_array_equal(again.base[path], leaf)


def test_a_text_with_too_few_places_for_images_is_refused(both):
    model, processor, _, inputs, _ = both
    ids = inputs["input_ids"].copy()
    ids[1] = 5
    with pytest.raises(ValueError, match="4 images were given, and the texts hold 3"):
        model.logits(**inputs | {"input_ids": ids})
    ids = inputs["input_ids"].copy()
    ids[0, np.flatnonzero(ids[0] == model.config.image_token_id)[-1]] = 5
    with pytest.raises(ValueError, match=r"row 0: .*image tokens"):
        model.logits(**inputs | {"input_ids": ids})
    with pytest.raises(ValueError, match="videos are not supported"):
        processor(text="x", videos=[np.zeros((2, 28, 28, 3))])


UNSUPPORTED = [
    ({"text_config": {"attention_dropout": 0.5}}, r"text_config\.attention_dropout=0\.5"),
    ({"vision_config": {"hidden_act": "tanh"}}, r"vision_config\.hidden_act='tanh'"),
]


@pytest.mark.parametrize("change, message", UNSUPPORTED)
def test_unsupported_fields_of_nested_configs_raise(both, change, message, tmp_path):
    folder = shutil.copytree(both[4], tmp_path / "model")
    fields = json.loads((folder / "config.json").read_text())
    for part, values in change.items():
        fields[part] |= values
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        FastVisionModel.from_pretrained(folder, load_in_4bit=False)


def quantised(model) -> set[str]:
    return {name for name, slot in model.slots.items() if f"{slot.path}.weight.codes" in model.base}


def test_what_is_quantised(both):
    """Unsloth's rule: the head and what joins tower and decoder stay in 16 bits, the tower does not. And where rows of
    the tower are no whole blocks of 64 (here down_proj's 96, in Qwen2.5-VL-7B its 3420) they stay too."""
    _, _, judge, inputs, folder = both
    model, _ = FastVisionModel.from_pretrained(folder, dtype="float32", max_seq_length=None)
    kinds = {re.sub(r"\.\d+\.", ".", name.removeprefix("model.")) for name in quantised(model)}
    text = {f"language_model.layers.self_attn.{p}_proj" for p in "qkvo"}
    text |= {f"language_model.layers.mlp.{p}_proj" for p in ("gate", "up", "down")}
    assert kinds == text | {f"visual.{name}" for name in QUANTISED[model.config.model_type]}
    weights = dict(judge.state_dict())
    same = copy.deepcopy(judge)
    same.load_state_dict(weights | {n: torch.tensor(w) for n, w in hf_weights(model)})
    with torch.no_grad():
        want = same(**as_torch(inputs)).logits
    assert largest_error(model.logits(**inputs), want, inputs["attention_mask"]) <= LOGITS


PARTS = {
    "all": ({}, r".*(visual\.blocks|layers)\.\d+\.(attn|self_attn|mlp)\..*"),
    "all-linear whatever is said": (
        {"target_modules": "all-linear", "finetune_vision_layers": False},
        r".*(visual\.blocks|layers)\.\d+\.(attn|self_attn|mlp)\..*",
    ),
    "language": ({"finetune_vision_layers": False}, r".*\.layers\..*"),
    "vision": ({"finetune_language_layers": False}, r".*visual\.blocks\..*"),
    "attention": ({"finetune_mlp_modules": False}, r".*(\.attn|self_attn)\..*"),
    "mlp of vision": (
        {"finetune_attention_modules": False, "finetune_language_layers": False},
        r".*visual\.blocks\.\d+\.mlp\..*",
    ),
    "names": ({"target_modules": ["q_proj", "qkv", "up_proj"]}, r".*\.(q_proj|qkv|up_proj)"),
    "some layers": ({"layers_to_transform": [1]}, r".*(visual\.blocks|layers)\.1\..*"),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_are_trained(name, both):
    model, _, judge, *_ = both
    options, pattern = PARTS[name]
    adapted = FastVisionModel.get_peft_model(model, r=2, **options)
    linear = {n for n, m in judge.named_modules() if isinstance(m, torch.nn.Linear)}
    middle = {n for n in linear if "merger" not in n and n != "lm_head"}
    got = {n.split(".lora_")[0].removeprefix("base_model.model.") for n in lora.adapter_tensors(adapted)}
    assert got == {n for n in middle if re.fullmatch(pattern, n)}
    fields = lora.config_to_peft(adapted.lora, "base")
    config = peft.LoraConfig(**{k: fields[k] for k in ("r", "target_modules", "layers_to_transform")})
    wrapped = peft.get_peft_model(copy.deepcopy(judge), config)
    theirs = {
        n.split(".lora_")[0].removeprefix("base_model.model.")
        for n, _ in wrapped.named_parameters()
        if ".lora_" in n
    }
    assert got == theirs


def test_adapters_of_fast_language_model_are_the_decoders(both):
    adapted = FastLanguageModel.get_peft_model(both[0], r=2)
    assert adapted.trainable and not [path for path in adapted.trainable if "visual" in path]


def test_nothing_to_train_is_refused(both):
    with pytest.raises(ValueError, match=r"nothing to train: .*vision=False, language=False"):
        FastVisionModel.get_peft_model(both[0], finetune_vision_layers=False, finetune_language_layers=False)


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
    """Loss and gradients of every adapter of tower and decoder, two micro-batches of a row, as PEFT's of both rows."""
    inputs = both[3]
    model, theirs = adapted
    mask = inputs["attention_mask"]
    ids = inputs["input_ids"]
    labels = np.where(
        (mask == 1) & (np.roll(mask, 1, 1) == 1) & (ids < 259), ids, -100
    )  # none behind padding
    logits = theirs(**as_torch(inputs)).logits
    want = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), torch.tensor(labels[:, 1:]).flatten()
    )
    want.backward()
    family = images.family(model.config)
    rows = family.rows(inputs, list(ids))
    sizes = family.sizes(rows)
    micro = []
    for row in range(2):
        one = slice(row, row + 1)
        text = {
            "input_ids": ids[one].astype(np.int32),
            "labels": labels[one].astype(np.int32),
            "segment_ids": mask[one].astype(np.int32),
            "positions": np.maximum(np.cumsum(mask[one], 1) - 1, 0).astype(np.int32),
        }
        micro.append(text | images.batch_arrays(family, ids[one], mask[one], rows[one], lambda _: sizes))
    batch = jax.tree.map(lambda *parts: np.stack(parts), *micro)
    zeros = partial(jax.tree.map, jnp.zeros_like)
    keeper = optax.GradientTransformation(zeros, lambda grads, state, params: (zeros(grads), grads))
    step = make_train_step(model, keeper, max_grad_norm=None, remat=Remat.parse("attention"))
    copies = jax.tree.map(jnp.copy, model.trainable)
    _, grads, metrics = step(copies, zeros(copies), model.base, batch, jax.random.key(0))
    assert abs(float(metrics["loss"]) - want.item()) <= LOSS * want.item()
    held = copy.copy(model)
    held.trainable = grads
    judged = {
        n.replace(".default", ""): p.grad.numpy() for n, p in theirs.named_parameters() if p.requires_grad
    }
    found = lora.adapter_tensors(held)
    assert found.keys() == judged.keys() and any("visual" in name for name in found)
    for name, value in found.items():
        assert np.abs(value - judged[name]).max() <= VISION_GRADIENT * np.abs(judged[name]).max(), name
    evaluate = make_eval_step(model)
    sums = [evaluate(model.trainable, model.base, part) for part in micro]
    total = sum(float(s["loss_sum"]) for s in sums) / sum(float(s["num_items"]) for s in sums)
    assert abs(total - want.item()) <= LOSS * want.item()


def test_adapters_are_saved_as_peft_reads_them(both, adapted, tmp_path):
    _, processor, judge, inputs, folder = both
    model, theirs = adapted
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(judge), tmp_path / "adapter").eval()
    with torch.no_grad():
        want = theirs(**as_torch(inputs)).logits
        got = loaded(**as_torch(inputs)).logits
    assert torch.equal(got, want)
    again, own = FastVisionModel.from_pretrained(
        tmp_path / "adapter", load_in_4bit=False, dtype="float32", max_seq_length=None
    )
    assert again.name_or_path == str(folder) and own.chat_template == processor.chat_template
    for path, leaf in model.trainable.items():
        np.testing.assert_array_equal(again.trainable[path], leaf)


def test_a_merged_model_is_loaded_by_transformers(both, adapted, tmp_path):
    _, processor, _, inputs, folder = both
    model, theirs = adapted
    model.save_pretrained_merged(tmp_path / "merged", processor, dtype="float32", progress=False)
    assert (
        load_file(tmp_path / "merged/model.safetensors").keys()
        == load_file(folder / "model.safetensors").keys()
    )
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert merged.config.to_dict().keys() == theirs.config.to_dict().keys()
    with torch.no_grad():
        want = theirs(**as_torch(inputs)).logits
        got = merged(**as_torch(inputs)).logits
    assert largest_error(got, want, inputs["attention_mask"]) <= MERGED
    for name, value in tiny_vision.rows(hub.resolve(tmp_path / "merged").processor()).items():
        np.testing.assert_array_equal(value, inputs[name])


def test_greedy_generation(both):
    """32 tokens of two rows, one with three images, left-padded."""
    model, _, judge, inputs, _ = both
    options = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        want = judge.generate(**as_torch(inputs), **options, eos_token_id=None)
    got = model.generate(**inputs, **options | {"eos_token_id": []})
    np.testing.assert_array_equal(got, want.numpy())


def test_prompts_that_differ_in_their_images_are_not_shared(both):
    model, _, _, inputs, _ = both
    row = inputs["input_ids"][1:][inputs["attention_mask"][1:] == 1]
    seen = images.family(model.config).rows(
        {k: inputs[k] for k in ("pixel_values", "image_grid_thw")}, inputs["input_ids"]
    )
    other = seen[1] | {"pixel_values": -seen[1]["pixel_values"]}
    made = model._engine.generate(
        [row, row, row], images=[seen[1], other, seen[1]], max_new_tokens=8, stop_token_ids=[]
    )
    first, second, third = (one.token_ids for one in made)
    assert list(first) == list(third) != list(second)


def test_bitsandbytes_folder_gives_its_logits(both, tmp_path):
    """Quantised by transformers, but for what Unsloth leaves out. The judge has the weights that bitsandbytes
    dequantises as rows of one block: on a CPU it goes wrong where a layer's rows are no whole blocks."""
    _, _, plain, inputs, folder = both
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["lm_head", r"model\.visual\.merger"],
    )
    judge = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization, device_map="cpu"
    )
    judge.save_pretrained(tmp_path / "bnb")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(folder / name, tmp_path / "bnb")
    model, _ = FastVisionModel.from_pretrained(tmp_path / "bnb", dtype="float32", max_seq_length=None)
    stored = {name: module.weight for name, module in judge.named_modules() if hasattr(module, "quant_state")}
    odd = {name for name, weight in stored.items() if weight.quant_state.shape[1] % 64}
    assert odd and quantised(model) == stored.keys() - odd
    weights = plain.state_dict()
    for name, weight in stored.items():
        state = copy.deepcopy(weight.quant_state)
        state.shape = torch.Size((weight.quant_state.shape.numel() // 64, 64))
        rows = bnb.functional.dequantize_4bit(weight.data, state)
        weights[f"{name}.weight"] = rows.reshape(weight.quant_state.shape)
    same = copy.deepcopy(plain)
    same.load_state_dict(weights)
    with torch.no_grad():
        want = same(**as_torch(inputs)).logits
    assert largest_error(model.logits(**inputs), want, inputs["attention_mask"]) <= LOGITS


def test_a_model_merged_in_4_bits_is_loaded_again(both, adapted, tmp_path):
    model, _ = adapted
    model.save_pretrained_merged(tmp_path / "merged", save_method="merged_4bit_forced", progress=False)
    again, _ = FastVisionModel.from_pretrained(tmp_path / "merged", dtype="float32", max_seq_length=None)
    fresh, _ = FastVisionModel.from_pretrained(both[4], dtype="float32", max_seq_length=None)
    assert quantised(again) == quantised(fresh)
    assert again.base.keys() == fresh.base.keys()


def test_a_published_config_is_flat_and_may_tie_the_head(tmp_path):
    """config.json as on the hub: the decoder's fields at the top, M-RoPE under its older name."""
    config = tiny_vision.make_config("qwen2_5_vl", tie_word_embeddings=True)
    folder = tiny_vision.save(tiny_vision.make_model(config), tmp_path / "model")
    fields = json.loads((folder / "config.json").read_text())
    text = fields.pop("text_config")
    rope = text.pop("rope_parameters")
    del text["model_type"], text["layer_types"]
    older = {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    fields["vision_config"] = {k: v for k, v in fields["vision_config"].items() if k != "rope_parameters"}
    (folder / "config.json").write_text(json.dumps(text | fields | older))
    model, processor = FastVisionModel.from_pretrained(
        folder, load_in_4bit=False, dtype="float32", max_seq_length=None
    )
    assert model.module.lm_head is None
    judge = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = tiny_vision.rows(processor)
    with torch.no_grad():
        want = judge(**as_torch(inputs)).logits
    assert largest_error(model.logits(**inputs), want, inputs["attention_mask"]) <= LOGITS
    model.save_pretrained_merged(tmp_path / "merged", dtype="float32", progress=False)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(again(**as_torch(inputs)).logits, want)
