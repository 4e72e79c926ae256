import json
import logging
import traceback

import huggingface_hub
import pytest
from export_judges import random_adapter
from hub_stub import StubHub

from jaxtune.export.upload import push_to_hub, push_to_hub_merged
from jaxtune.fast import FastLanguageModel
from jaxtune.hub import HubError, resolve

TOKEN = "hf_stubstubstubstubstub"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stub hub without pauses between retries; the process may talk to it although tests are offline otherwise."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # the LFS protocol
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with StubHub(TOKEN) as server:
        yield server


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    base, _ = FastLanguageModel.from_pretrained(
        str(tiny_model_dir("llama")), max_seq_length=None, dtype="float32", load_in_4bit=True
    )
    return random_adapter(base)


def test_adapter(hub, model):
    url = push_to_hub(model, "me/adapter", token=TOKEN, private=True, endpoint=hub.endpoint)
    assert url.startswith(f"{hub.endpoint}/me/adapter/commit/")
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(
        hub.files["me/adapter"]
    )
    assert hub.created[0]["visibility"] == "private" and hub.commits == [
        "Upload adapter trained with jaxtune"
    ]
    assert any("/preupload/" in path for _, path in hub.requests) and hub.blobs, "large files go through LFS"


def test_merged_model_comes_back_whole(hub, model, tmp_path):
    model.push_to_hub_merged(
        "me/merged", model.tokenizer, save_method="merged_16bit", token=TOKEN, max_shard_size="200KB",
        endpoint=hub.endpoint, commit_message="mine",
    )  # fmt: skip
    model.save_pretrained_merged(tmp_path / "local", progress=False)
    back = resolve("me/merged", token=TOKEN, cache_dir=tmp_path / "cache", endpoint=hub.endpoint)
    local = resolve(tmp_path / "local")
    assert set(back.names()) == set(local.names()) and hub.commits == ["mine"]
    for name in local.names():
        assert (back.read(name) == local.read(name)).all()
    assert json.loads(hub.files["me/merged"]["config.json"])["dtype"] == "bfloat16"


def test_gguf(hub, model):
    url = model.push_to_hub_gguf(
        "me/gguf", model.tokenizer, ["q8_0", "q4_0"], token=TOKEN, name="tiny", endpoint=hub.endpoint, progress=False,
        processes=1,
    )  # fmt: skip
    files = hub.files["me/gguf"]
    assert "/me/gguf/commit/" in url and set(files) == {"tiny.Q8_0.gguf", "tiny.Q4_0.gguf", "Modelfile"}
    assert files["tiny.Q8_0.gguf"].startswith(b"GGUF") and hub.commits == ["Upload GGUF made with jaxtune"]
    with pytest.raises(HubError, match="401"):
        model.push_to_hub_gguf("me/other", token="hf_wrongwrongwrong", endpoint=hub.endpoint)


def test_second_upload_to_the_same_repository(hub, model):
    for _ in range(2):
        push_to_hub(model, "me/adapter", token=TOKEN, endpoint=hub.endpoint)
    assert len(hub.commits) == 2


@pytest.mark.parametrize(
    ("where", "status", "message"),
    [
        ("/api/repos/create", 401, "cannot create or open the repository 'me/x'"),
        ("/api/repos/create", 500, "cannot create or open the repository 'me/x'"),
        ("/preupload/", 403, "the upload to 'me/x' failed"),
        ("/preupload/", 500, "the upload to 'me/x' failed"),
        ("/lfs/", 500, "the upload to 'me/x' failed"),
        ("/info/lfs/objects/batch", 401, "the upload to 'me/x' failed"),
        ("/commit/", 500, "the upload to 'me/x' failed"),
    ],
)
def test_refusals_are_clear_and_hold_no_token(hub, model, where, status, message, caplog, capfd):
    hub.failures[where] = status
    caplog.set_level(logging.INFO)
    for name in ("jaxtune", "huggingface_hub"):
        caplog.set_level(logging.DEBUG, name)
    with pytest.raises(HubError, match=message) as caught:
        push_to_hub(model, "me/x", token=TOKEN, endpoint=hub.endpoint)
    assert str(status) in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    shown = "".join(traceback.format_exception(caught.value)) + caplog.text + "".join(capfd.readouterr())
    assert TOKEN not in shown


def test_refusal_in_the_xet_protocol(hub, model, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    hub.failures["/xet-write-token/"] = 401
    with pytest.raises(HubError, match="the upload to 'me/x' failed") as caught:
        push_to_hub(model, "me/x", token=TOKEN, endpoint=hub.endpoint)
    assert TOKEN not in "".join(traceback.format_exception(caught.value))


def test_wrong_token_fails_before_anything_is_saved(hub, model, monkeypatch):
    monkeypatch.setattr("jaxtune.export.upload.save_merged", lambda *_, **__: pytest.fail("saved too early"))
    with pytest.raises(HubError, match="401"):
        push_to_hub_merged(model, "me/x", token="hf_wrongwrongwrong", endpoint=hub.endpoint)


def test_name_that_is_no_repository(hub, model):
    with pytest.raises(HubError, match="cannot create or open the repository 'a/b/c'"):
        push_to_hub(model, "a/b/c", token=TOKEN, endpoint=hub.endpoint)
