import json
import logging
import traceback

import huggingface_hub
import numpy as np
import peft
import pytest
import tiny_models
import torch
import transformers
from hub_stub import StubHub
from safetensors.numpy import load_file

from jaxtune.hub import HubError, fix_pad_token, redact, resolve

TOKEN = "hf_stubstubstubstubstub"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stub hub; the process may talk to it although tests are offline otherwise."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with StubHub(TOKEN) as server:
        yield server


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def repository(hub, tiny_model_dir):
    """A model repository with the duplicates and side folders that real ones have."""
    files = contents(tiny_model_dir("llama"))
    extra = (
        "pytorch_model.bin",
        "consolidated.safetensors",
        "model.Q4_0.gguf",
        "original/params.json",
        "README.md",
    )
    hub.files["me/tiny"] = files | {name: b"{}" for name in extra}
    return hub


def download(hub, tmp_path, name="me/tiny", **keywords):
    return resolve(name, cache_dir=tmp_path / "cache", endpoint=hub.endpoint, **keywords)


def assert_same_weights(checkpoint, folder):
    expected = load_file(folder / "model.safetensors")
    assert set(checkpoint.names()) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(checkpoint.read(name), value)


def test_local_folder(tiny_model_dir):
    folder = tiny_model_dir("llama")
    checkpoint = resolve(folder)
    assert (checkpoint.kind, checkpoint.path, checkpoint.adapter) == ("safetensors", folder, None)
    assert checkpoint.config.model_type == "llama" and checkpoint.name_or_path == str(folder)
    assert_same_weights(checkpoint, folder)
    tokenizer = checkpoint.tokenizer()
    assert tokenizer.padding_side == "left" and tokenizer.chat_template == tiny_models.CHATML
    assert checkpoint.generation_config["eos_token_id"] == 2


def test_hub_id_fetches_each_weight_once(repository, tmp_path, tiny_model_dir):
    checkpoint = download(repository, tmp_path, revision="v1")
    assert (checkpoint.name_or_path, checkpoint.revision) == ("me/tiny", "v1")
    assert_same_weights(checkpoint, tiny_model_dir("llama"))
    fetched = {path.rsplit("/", 1)[1] for method, path in repository.requests if "/resolve/" in path}
    assert fetched == set(contents(tiny_model_dir("llama")))
    assert ("GET", "/api/models/me/tiny/revision/v1") in repository.requests


def test_cache_only(repository, tmp_path):
    with pytest.raises(HubError, match="the local cache did not give it"):
        download(repository, tmp_path, local_files_only=True)
    assert not repository.requests
    download(repository, tmp_path)
    seen = len(repository.requests)
    assert download(repository, tmp_path, local_files_only=True).config.model_type == "llama"
    assert len(repository.requests) == seen


def test_private_repository_needs_the_token(repository, tmp_path):
    repository.private.add("me/tiny")
    assert download(repository, tmp_path, token=TOKEN).config.model_type == "llama"


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_tokens_never_show(repository, tmp_path, status, caplog, capfd):
    """The stub repeats the token in its errors; message, traceback, logs and output must not."""
    repository.failures["/api/models/me/tiny"] = status
    caplog.set_level(logging.INFO)
    for name in ("jaxtune", "huggingface_hub"):
        caplog.set_level(logging.DEBUG, name)
    for token in (TOKEN, "another-secret-form"):
        with pytest.raises(HubError, match="'me/tiny' is no local folder") as caught:
            download(repository, tmp_path, token=token)
        shown = "".join(traceback.format_exception(caught.value)) + caplog.text + "".join(capfd.readouterr())
        chained = caught.value.__cause__ or caught.value.__context__
        assert token not in shown and chained is None
        assert f"Bearer {token}" not in repr(caught.value)


def test_redact(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "stored-secret")
    text = redact("a given-secret b stored-secret c hf_abcdefghijklmnop d", "given-secret")
    assert text == "a *** b *** c *** d"


def test_repository_without_safetensors(hub, tmp_path, tiny_model_dir):
    files = contents(tiny_model_dir("llama"))
    del files["model.safetensors"]
    hub.files["me/old"] = files | {"pytorch_model.bin": b"x"}
    with pytest.raises(FileNotFoundError, match=r"me/old: .*no model\.safetensors.*refs/pr/1"):
        download(hub, tmp_path, "me/old")


def test_unknown_names():
    with pytest.raises(FileNotFoundError, match=r"\./nowhere does not exist"):
        resolve("./nowhere")
    with pytest.raises(FileNotFoundError, match=r"model\.gguf does not exist"):
        resolve("some/model.gguf")
    with pytest.raises(FileNotFoundError, match=r"/model\.gguf does not exist"):
        resolve("/nowhere/some/model.gguf")
    with pytest.raises(HubError, match=r"is no local folder or \.gguf file"):
        resolve("not a name")


def test_empty_folder_says_what_it_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json.*config\.json.*\*\.gguf.*notes\.txt"):
        resolve(tmp_path)


def test_other_quantisation_is_refused(tiny_model_dir, tmp_path):
    config = json.loads((tiny_model_dir("llama") / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quant_method is 'awq'"):
        resolve(tmp_path)


@pytest.fixture
def adapter(tiny_model_dir, tmp_path):
    """A PEFT folder whose base is the tiny llama by absolute path."""
    folder = tiny_model_dir("llama")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_adapter_with_absolute_base(adapter, tiny_model_dir):
    checkpoint = resolve(adapter)
    assert checkpoint.adapter == adapter and checkpoint.path == tiny_model_dir("llama")
    assert_same_weights(checkpoint, tiny_model_dir("llama"))
    assert checkpoint.tokenizer().chat_template == tiny_models.CHATML  # the base's
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.chat_template = "own"
    tokenizer.save_pretrained(adapter)
    assert resolve(adapter).tokenizer().chat_template == "own"


def test_adapter_with_relative_base(adapter, tiny_model_dir, tmp_path, monkeypatch):
    (tmp_path / "base").symlink_to(tiny_model_dir("llama"))
    edit(adapter, base_model_name_or_path="../base")
    assert resolve(adapter).config.model_type == "llama"
    edit(adapter, base_model_name_or_path="base")
    monkeypatch.chdir(tmp_path)
    assert resolve(adapter).config.model_type == "llama"


def test_adapter_beside_a_model_wins(adapter, tiny_model_dir):
    """A folder with both files is an adapter; its base may be the folder itself."""
    for name, content in contents(tiny_model_dir("llama")).items():
        (adapter / name).write_bytes(content)
    assert resolve(adapter).path == tiny_model_dir("llama")
    edit(adapter, base_model_name_or_path=str(adapter))
    checkpoint = resolve(adapter)
    assert checkpoint.path == adapter == checkpoint.adapter


def test_adapter_and_base_on_the_hub(adapter, repository, tmp_path):
    edit(adapter, base_model_name_or_path="me/tiny", revision="v2")
    repository.files["me/adapter"] = contents(adapter)
    checkpoint = download(repository, tmp_path, "me/adapter")
    assert (
        checkpoint.adapter is not None
        and checkpoint.name_or_path == "me/tiny"
        and checkpoint.revision == "v2"
    )


def test_adapter_errors(adapter, tmp_path):
    edit(adapter, base_model_name_or_path="/nowhere/base")
    with pytest.raises(FileNotFoundError, match="names the base '/nowhere/base', which does not exist"):
        resolve(adapter)
    edit(adapter, base_model_name_or_path=None)
    with pytest.raises(ValueError, match="names no base_model_name_or_path"):
        resolve(adapter)
    edit(adapter, peft_type="IA3")
    with pytest.raises(ValueError, match="peft_type is 'IA3'"):
        resolve(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors"):
        resolve(adapter)


def test_gguf_file_folder_and_repository(smollm2_gguf, hub, tmp_path):
    checkpoint = resolve(smollm2_gguf)
    assert checkpoint.kind == "gguf" and checkpoint.config.num_hidden_layers == 30
    assert resolve(smollm2_gguf.parent).path == smollm2_gguf
    tokenizer = checkpoint.tokenizer()
    assert tokenizer.padding_side == "left" and tokenizer.pad_token == "<|endoftext|>"
    hub.files["me/gguf"] = {"a.gguf": smollm2_gguf.read_bytes(), "b.gguf": b"x", "README.md": b""}
    checkpoint = download(hub, tmp_path, "me/gguf", gguf_file="a.gguf")
    assert checkpoint.read("model.norm.weight").shape == (576,)
    assert checkpoint.name_or_path == "me/gguf/a.gguf"
    assert download(hub, tmp_path, checkpoint.name_or_path).path == checkpoint.path
    assert not any("b.gguf" in path for _, path in hub.requests)


def test_folder_of_several_gguf_files(tmp_path):
    for name in ("a.gguf", "b.gguf", "mmproj-a.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"several \.gguf files \(a\.gguf, b\.gguf\)"):
        resolve(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file c\.gguf"):
        resolve(tmp_path, gguf_file="c.gguf")


def config(**fields):
    return transformers.LlamaConfig(**{"vocab_size": 320, "pad_token_id": None} | fields)


def tokenizer(pad, extra=(), unk=None):
    made = tiny_models.make_tokenizer()
    made.add_tokens(list(extra), special_tokens=True)
    made.pad_token, made.unk_token = pad, unk
    return made


@pytest.mark.parametrize(
    ("pad", "extra", "unk", "expected"),
    [
        ("<|endoftext|>", (), None, "<|endoftext|>"),  # already fine
        ("<|im_end|>", (), None, "<|endoftext|>"),  # equal to EOS
        (None, (), None, "<|endoftext|>"),
        (None, ("<|finetune_right_pad_id|>", "<pad>"), None, "<|finetune_right_pad_id|>"),
        (None, ("[PAD]",), "<|endoftext|>", "[PAD]"),
    ],
)
def test_pad_token(pad, extra, unk, expected):
    made = tokenizer(pad, extra, unk)
    size = len(made)
    fix_pad_token(made, config())
    assert made.pad_token == expected and len(made) == size


def bare(unk=None, pad=None):
    """A tokenizer whose tokens are none of the well-known spare ones."""
    from tokenizers import Tokenizer, models

    core = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "<unk>": 2, "<|reserved_7|>": 3}, "<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", unk_token=unk, pad_token=pad
    )


def test_pad_token_without_a_spare(caplog):
    made = bare()
    fix_pad_token(made, config())
    assert made.pad_token == "<|reserved_7|>"
    made = bare(unk="<unk>")
    fix_pad_token(made, config(vocab_size=3))  # the reserved token has no embedding row
    assert made.pad_token == "<unk>"
    made = bare()
    fix_pad_token(made, config(vocab_size=3, pad_token_id=0))
    assert made.pad_token == "a"
    made = bare()
    fix_pad_token(made, config(vocab_size=3))
    assert made.pad_token == "</s>" and "no spare token" in caplog.text


def test_tokens_without_an_embedding_row(tiny_model_dir, caplog, tmp_path):
    for name, content in contents(tiny_model_dir("llama")).items():
        (tmp_path / name).write_bytes(content)
    assert resolve(tmp_path).tokenizer() and not caplog.text
    made = tiny_models.make_tokenizer()
    made.add_tokens([f"<extra_{i}>" for i in range(320)])
    made.save_pretrained(tmp_path)
    resolve(tmp_path).tokenizer()
    assert "259 tokens have no row in the embedding of 320 (<extra_" in caplog.text


def test_old_buffers_are_not_weights(tmp_path):
    model = tiny_models.make_model(tiny_models.make_config("llama"))
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in resolve(tmp_path).names()
