"""Prompts with images through vLLM, against a stub of its server; test_vllm_real has the real one."""

import numpy as np
import pytest
import tiny_vision
from vllm_stub import StubVLLM

from jaxtune import FastVisionModel, GRPOConfig
from jaxtune.rl.images import PromptImages
from jaxtune.rl.rollout import Request
from jaxtune.rl.vllm_rollout import VLLMRollout
from jaxtune.rl.vllm_server import VLLMError


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The model without an adapter, and its processor."""
    made = tiny_vision.make_config(
        "qwen2_5_vl",
        text_config={"num_hidden_layers": 1},
        vision_config={"depth": 1, "fullatt_block_indexes": [0]},
    )
    folder = tiny_vision.save(tiny_vision.make_model(made), tmp_path_factory.mktemp("qwen2_5_vl"))
    return FastVisionModel.from_pretrained(folder, max_seq_length=128, dtype="float32", load_in_4bit=False)


def config(folder, url="http://127.0.0.1:9", **settings):
    return GRPOConfig(
        str(folder), use_vllm=True, vllm_mode="server", vllm_server_base_url=url, max_completion_length=10,
        num_generations=2, vllm_server_timeout=5, vllm_adapter_dir=str(folder / "adapters"), disable_tqdm=True,
        dataloader_num_workers=1, per_device_train_batch_size=6, **settings,
    )  # fmt: skip


def rollout(base, *where):
    return VLLMRollout(
        FastVisionModel.get_peft_model(base[0], r=4, finetune_vision_layers=False), config(*where)
    )


@pytest.fixture(scope="module")
def request_(base, tmp_path_factory):
    """Prompts with one image, two, and none, two completions each."""

    def row(i, sizes):
        pictures = [tiny_vision.picture(*size, i) for size in sizes]
        parts = [*[{"type": "image"}] * len(pictures), {"type": "text", "text": "what" + "?" * i}]
        return {"prompt": [{"role": "user", "content": parts}], "images": pictures}

    rows = [row(i, sizes) for i, sizes in enumerate([[(60, 60)], [(90, 60), (60, 120)], []])]
    prompts = PromptImages(*base, config(tmp_path_factory.mktemp("data"))).prepare(
        rows, limit=128, tokenise=True
    )
    numbers = np.repeat(np.arange(3), 2)
    shown, ids = [prompts.rows[i]["prompt"] for i in numbers], [prompts.ids[i] for i in numbers]
    made = Request(shown, ids, group=2, seed=3, max_new_tokens=10, seen=prompts.seen(numbers))
    prompts.images.close()
    return made


def test_images_go_with_their_text(base, request_, tmp_path):
    """What the server's processor makes of them are our tokens; a prompt without images goes as tokens."""
    with StubVLLM(processor=base[1]) as server:
        asking = rollout(base, tmp_path, server.url)
        asking.sync(0)
        made = asking.generate(request_)
        asking.close()
    assert made.prompt_ids == request_.prompt_ids
    assert [len(ids) for ids in made.completion_ids] == [4] * 6
    assert made.logprobs == [[-0.5, -1.5, -2.5, -3.5]] * 6
    asked = sorted(server.payloads, key=lambda payload: request_.prompt_ids.index(list(payload["prompt"])))
    assert [name for name, _ in server.events].count("chat/completions") == 2 and len(asked) == 3
    assert len({payload["seed"] for payload in asked}) == 3
    assert [len(payload["messages"][0]["content"]) - 1 for payload in asked[:2]] == [1, 2]
    assert all(payload["logprobs"] is True and payload["return_token_ids"] for payload in asked[:2])
    assert all(payload["model"].startswith("jaxtune-") and payload["n"] == 2 for payload in asked)


def test_a_server_whose_processor_makes_other_tokens(base, request_, tmp_path):
    def larger(**arguments):
        return base[1](**arguments, size={"shortest_edge": 20 * 28**2, "longest_edge": 24 * 28**2})

    with StubVLLM(processor=larger, max_model_len=256) as server:
        asking = rollout(base, tmp_path, server.url)
        asking.sync(0)
        with pytest.raises(
            VLLMError, match=r"vLLM makes [0-9]+ tokens of prompt 0 with its images and jaxtune 2[0-9];"
        ):
            asking.generate(request_)
        server.answers["chat/completions"] = lambda handler: handler.refuse(400, "Chat template is passed")
        with pytest.raises(VLLMError, match="Chat template is passed") as caught:
            asking.generate(request_)
        asking.close()
    assert "--trust-request-chat-template" in caught.value.__notes__[0]


def test_adapters_and_arguments(base, tmp_path):
    """vLLM's adapters are for the layers of the language model."""
    asking = rollout(base, tmp_path)
    assert "--trust-request-chat-template" in asking.engine._server_arguments(tmp_path, 1)
    tower = FastVisionModel.get_peft_model(base[0], r=4, finetune_vision_layers=True)
    with pytest.raises(ValueError, match=r"others \(model.visual.*finetune_vision_layers=False"):
        VLLMRollout(tower, config(tmp_path))
