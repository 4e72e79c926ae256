"""text_only=True: the text model inside each vision-language family, against transformers' whole model, float32."""

import json
import shutil

import jax
import numpy as np
import optax
import peft
import pytest
import tiny_mllama
import tiny_siglip
import tiny_vision
import torch
import transformers
from export_judges import in_float32, logits_of, random_adapter, relative_error
from test_step import batch_of
from tolerances import LLAMA_CPP_GELU, LLAMA_CPP_LOGITS, LOGITS, MERGED, SAMPLED_LOGPROBS

from jaxtune.export.gguf_adapter import save_gguf_adapter
from jaxtune.fast import FastLanguageModel, FastVisionModel
from jaxtune.generate.requests import LoRARequest, SamplingParams
from jaxtune.step import make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

MAKERS = {
    "qwen2_5_vl": tiny_vision,
    "qwen3_vl": tiny_vision,
    "gemma3": tiny_siglip,
    "idefics3": tiny_siglip,
    "smolvlm": tiny_siglip,
    "mllama": tiny_mllama,
}
ALONE = {
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "gemma3": "gemma3_text",
    "idefics3": "llama",
    "smolvlm": "llama",
    "mllama": "llama",
}
# What llama.cpp knows of Gemma 3 by itself.
GEMMA = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    "query_pre_attn_scalar": 16,
}
LOAD = {"load_in_4bit": False, "dtype": "float32", "max_seq_length": None}
IDS = np.random.default_rng(0).integers(3, 250, (2, 40), np.int32)
# Adapters whose names are not those of the whole model: its tower has layers of these names, and numbers of its own.
ADAPTERS = {
    "names": {"target_modules": ["q_proj", "v_proj", "up_proj"], "use_dora": True},
    "layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1, 2]},
    "whole": {"target_modules": ["o_proj", "embed_tokens", "lm_head"]},
}


@pytest.fixture(scope="module", params=MAKERS)
def whole(request, tmp_path_factory):
    """(a family's folder, transformers' model of it)."""
    maker = MAKERS[request.param]
    config = maker.make_config(request.param, text_config=GEMMA if request.param == "gemma3" else {})
    folder = maker.save(maker.make_model(config), tmp_path_factory.mktemp(request.param))
    return folder, judge_of(folder)


def judge_of(folder):
    kind = transformers.AutoModelForImageTextToText
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def alone(whole):
    """(model, tokenizer) of the text alone."""
    return FastVisionModel.from_pretrained(whole[0], text_only=True, **LOAD)


@pytest.fixture(scope="module")
def adapted(whole):
    """By name, the text models with random adapters of ADAPTERS."""
    made = {}

    def make(name: str):
        if name not in made:
            model = FastLanguageModel.from_pretrained(whole[0], text_only=True, **LOAD)[0]
            made[name] = random_adapter(model, **ADAPTERS[name])
        return made[name]

    return make


def logits(model) -> np.ndarray:
    return np.asarray(model.logits(IDS))


def llama_cpp_tolerance(whole) -> float:
    return LLAMA_CPP_GELU if whole[1].config.model_type == "gemma3" else LLAMA_CPP_LOGITS


def test_logits_are_the_whole_models(whole, alone, recwarn):
    model = alone[0]
    assert relative_error(logits(model), logits_of(whole[1], IDS)) <= LOGITS
    FastLanguageModel.from_pretrained(whole[0], text_only=True, **LOAD)
    assert not [warning for warning in recwarn if "text_only" in str(warning.message)]


def test_nothing_of_the_tower_is_kept(whole, alone):
    folder, judge = whole
    model, tokenizer = alone
    assert model.processor is None and model.tokenizer is tokenizer
    assert model.config.model_type == ALONE[judge.config.model_type]
    assert all(
        path.startswith(("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head."))
        for path in model.base
    )
    full, _ = FastLanguageModel.from_pretrained(folder, **LOAD)
    tower = [n for n, _ in judge.named_parameters() if "language_model" not in n and "text_model" not in n]
    size = sum(judge.get_parameter(name).nbytes for name in tower if "lm_head" not in name)
    assert size > 0.2 * model.memory_bytes()
    assert full.memory_bytes() - model.memory_bytes() >= size


def test_tokens_have_rows(alone):
    model, tokenizer = alone
    assert max(tokenizer.get_vocab().values()) < model.config.vocab_size
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    chat = [{"role": "user", "content": "hello"}]
    assert "hello" in tokenizer.apply_chat_template(chat, tokenize=False)


def test_the_processors_template_is_taken_where_the_tokenizer_has_none(tmp_path):
    folder = tiny_siglip.save(tiny_siglip.make_model(tiny_siglip.make_config("smolvlm")), tmp_path)
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "only the processor's"}))
    _, tokenizer = FastLanguageModel.from_pretrained(folder, text_only=True, **LOAD)
    assert tokenizer.chat_template == "only the processor's"


def test_it_trains(whole, alone):
    """The adapter of FastVisionModel's defaults, on all devices that a text model may use."""
    model = FastVisionModel.get_peft_model(alone[0], r=4)
    assert any(".mlp." in path for path in model.trainable)
    optimizer, batch = optax.adam(1e-2), batch_of([20, 30, 14], 64)
    step, state, losses = make_train_step(model, optimizer), optimizer.init(model.trainable), []
    trainable = jax.tree.map(jax.numpy.copy, model.trainable)
    for i in range(4):
        trainable, state, metrics = step(trainable, state, model.base, batch, jax.random.key(i))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_fit_the_whole_model(whole, adapted, alone, tmp_path, name):
    """Saved, they are PEFT's and jaxtune's for the whole model, and come back on the text alone."""
    folder, _ = whole
    model = adapted(name)
    want = logits(model)
    assert relative_error(want, logits(alone[0])) > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(judge_of(folder), tmp_path / "adapter").eval()
    assert relative_error(logits_of(theirs, IDS), want) <= MERGED
    full, processor = FastVisionModel.from_pretrained(tmp_path / "adapter", **LOAD)
    assert full.processor is processor
    stored = transformers.AutoTokenizer.from_pretrained(folder)
    assert processor.tokenizer.get_vocab() == stored.get_vocab()
    assert processor.tokenizer("<|image|>")["input_ids"] == stored("<|image|>")["input_ids"]
    assert relative_error(logits(full), want) <= MERGED
    again, _ = FastVisionModel.from_pretrained(tmp_path / "adapter", text_only=True, **LOAD)
    assert again.trainable.keys() == model.trainable.keys()
    np.testing.assert_array_equal(logits(again), want)
    assert again.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    with pytest.warns(UserWarning, match="already has this adapter"):
        assert FastLanguageModel.get_peft_model(again, r=4, **ADAPTERS[name]) is again


def test_an_adapter_answers_a_request(whole, adapted, tmp_path):
    model = adapted("layers")
    model.save_pretrained(tmp_path / "adapter")
    other = FastLanguageModel.from_pretrained(whole[0], text_only=True, **LOAD)[0]
    other = FastLanguageModel.get_peft_model(other, r=4, **ADAPTERS["layers"])
    one, request = SamplingParams(temperature=0.0, max_tokens=1), LoRARequest(tmp_path / "adapter")
    answer = other.fast_generate("some text", one, lora_request=request)[0].outputs[0]
    last = model.logits([model.tokenizer("some text")["input_ids"]])[0, -1]
    assert answer.cumulative_logprob == pytest.approx(
        float(jax.nn.log_softmax(last).max()), abs=SAMPLED_LOGPROBS
    )


def test_the_whole_models_adapters_of_the_language_part(whole, tmp_path):
    """Those of Llama 3.2 Vision are on the layers too that see images alone."""
    full = random_adapter(FastVisionModel.from_pretrained(whole[0], **LOAD)[0])
    full.save_pretrained(tmp_path / "adapter")
    if whole[1].config.model_type == "mllama":
        with pytest.raises(ValueError, match=r"layers\.1\.cross_attn.*without text_only=True"):
            FastVisionModel.from_pretrained(tmp_path / "adapter", text_only=True, **LOAD)
        return
    model, _ = FastVisionModel.from_pretrained(tmp_path / "adapter", text_only=True, **LOAD)
    assert relative_error(logits(model), logits(full)) <= MERGED


def test_an_adapter_on_more_than_the_text_is_refused(whole, tmp_path):
    folder, _ = whole
    model = FastVisionModel.get_peft_model(FastVisionModel.from_pretrained(folder, **LOAD)[0], r=4)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"more than the language part \(.*without text_only=True"):
        FastVisionModel.from_pretrained(tmp_path / "adapter", text_only=True, **LOAD)


@pytest.mark.parametrize("base", ["dequantised", "original"])
def test_merged_folders_are_the_text_models(whole, adapted, tmp_path, base):
    model = adapted("whole")
    model.save_pretrained_merged(tmp_path / "merged", base=base, dtype="float32", progress=False)
    fields = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert fields["model_type"] == ALONE[whole[1].config.model_type] and "vision_config" not in fields
    judge = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert fields["architectures"] == [type(judge).__name__]
    assert relative_error(logits_of(judge, IDS), logits(model)) <= MERGED
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert not (tmp_path / "merged" / "preprocessor_config.json").exists()


def test_full_finetuning(whole, tmp_path):
    model, _ = FastLanguageModel.from_pretrained(
        whole[0], text_only=True, full_finetuning=True, dtype="float32", max_seq_length=None
    )
    model.save_pretrained_merged(tmp_path / "full", dtype="float32", progress=False)
    judge = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.float32).eval()
    assert relative_error(logits_of(judge, IDS), logits_of(whole[1], IDS)) <= MERGED


def test_gguf_is_the_text_models(whole, adapted, llama_cpp, tmp_path):
    model = adapted("names")
    result = model.save_pretrained_gguf(tmp_path / "gguf", quantization_method="f32")
    assert len(result["gguf_files"]) == 1 and not result["is_vlm"]
    with llama_cpp.load(result["gguf_files"][0]) as loaded:
        got = loaded.logits(IDS[0].tolist())
    assert relative_error(got, logits(model)[0]) <= llama_cpp_tolerance(whole)


def test_gguf_adapters_are_for_the_text_models_file(whole, alone, adapted, llama_cpp, tmp_path):
    files = alone[0].save_pretrained_gguf(tmp_path / "gguf", quantization_method="f32")["gguf_files"]
    adapter = save_gguf_adapter(adapted("layers"), tmp_path / "adapter.gguf")
    with llama_cpp.load(files[0], adapter=adapter) as loaded:
        got = loaded.logits(IDS[0].tolist())
    assert relative_error(got, logits(adapted("layers"))[0]) <= llama_cpp_tolerance(whole)


def test_nf4_checkpoints(tmp_path):
    """bitsandbytes' weights of the whole model, as they are stored; its other quantised layers are not read."""
    folder = tiny_vision.save(tiny_vision.make_model(tiny_vision.make_config("qwen3_vl")), tmp_path / "plain")
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["lm_head", r"model\.visual\.merger", "model.language_model.layers.1.mlp"],
    )
    kind = transformers.AutoModelForImageTextToText
    judge = kind.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization, device_map="cpu"
    )
    judge.save_pretrained(tmp_path / "bnb")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / "bnb")
    model, _ = FastVisionModel.from_pretrained(
        tmp_path / "bnb", text_only=True, dtype="float32", max_seq_length=None
    )
    assert relative_error(logits(model), logits_of(in_float32(judge), IDS)) <= LOGITS
    assert "model.layers.1.0.mlp.up_proj.weight" in model.base  # not quantised there
