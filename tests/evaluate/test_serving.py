"""Evaluation through vLLM, against a stub of its server: the same answers, resuming, and every refusal."""

import copy
import json
import os
import threading

import pytest
from vllm_stub import StubVLLM, python_with_vllm

from jaxtune.evaluate import EvaluateConfig, evaluate
from jaxtune.evaluate.__main__ import main
from jaxtune.fast import FastLanguageModel
from jaxtune.generate import Engine, Sampling
from jaxtune.rl.reference import without_adapter
from jaxtune.rl.vllm_config import VLLMConfig
from jaxtune.rl.vllm_engine import VLLMEngine

ROWS = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(5)]
SHORT = {"instruction": "", "max_new_tokens": 8}
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def folder(tiny_model_dir):
    return tiny_model_dir("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def model(folder, quick_compilation):
    return FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=None, dtype="float32", load_in_4bit=False
    )[0]


@pytest.fixture(scope="module")
def adapted(model):
    return FastLanguageModel.get_peft_model(model, r=4, init_lora_weights=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


class Sampler:
    """The stub's sampler: answers as a model would, by the embedded engine."""

    def __init__(self, model, shift=0.0):
        self.engine, self.shift, self.left = Engine(model, progress=False), shift, 10**6
        self.lock = threading.Lock()

    def __call__(self, payload, number):
        with self.lock:
            self.left -= 1
            if self.left < 0:
                raise ConnectionError
            sampling = Sampling(do_sample=True, temperature=payload["temperature"] or 1)
            made = self.engine.generate(
                [payload["prompt"]],
                sampling=sampling if payload["temperature"] else None,
                max_new_tokens=payload["max_tokens"],
                seed=(payload["seed"] + number) % 2**32,
            )[0]
        return made.token_ids, [float(x) + self.shift for x in made.logprobs]


def texts(results):
    return [[one.text for one in judged.completions] for judged in results.judged]


def flags(name, data, out, server):
    where = ["--use_vllm", "--vllm_mode", "server", "--vllm_server_base_url", server.url]
    asked = ["--instruction", "", "--max_new_tokens", "8", "--vllm_server_timeout", "5"]
    return [str(name), "--data", str(data), "--output_dir", str(out), *asked, *where]


@pytest.mark.parametrize("kind", ["base", "adapter"])
def test_greedy_answers_are_the_engines(kind, model, adapted, tmp_path):
    evaluated = model if kind == "base" else adapted
    own = evaluate(evaluated, ROWS[:3], EvaluateConfig(**SHORT), progress=False)
    with StubVLLM(Sampler(evaluated), max_model_len=512) as server:
        args = VLLMConfig(use_vllm=True, vllm_mode="server", vllm_server_base_url=server.url)
        with VLLMEngine(evaluated, args, tmp_path, length=256) as engine:
            theirs = evaluate(evaluated, ROWS[:3], EvaluateConfig(**SHORT), engine=engine, progress=False)
        routes = [route for route, _ in server.events]
        assert not server.adapters
    assert texts(theirs) == texts(own) and theirs.metrics == own.metrics
    assert [one.finish_reason for row in theirs.judged for one in row.completions] == [
        one.finish_reason for row in own.judged for one in row.completions
    ]
    loads = ["load_lora_adapter"] if kind == "adapter" else []
    assert routes == [*loads, *["completions"] * 3, *[one.replace("load", "unload") for one in loads]]


def test_the_command_goes_on_after_a_server_that_died(folder, model, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jaxtune.evaluate.job.ROWS", 2)
    sampling = ["--temperature", "1", "--seed", "3", "--num_completions_to_print", "0"]
    with StubVLLM(Sampler(model), max_model_len=512) as server:
        assert main([*flags(folder, data, tmp_path / "whole", server), *sampling, "--n", "2"]) == 0
        said = capsys.readouterr().out
        assert "answers from vLLM" in said and "pass@2" in said and "maj@2" in said
        dying = flags(folder, data, tmp_path / "dying", server)
        server.sample.left = 4 + 2  # what is compared, and half of the first row's
        assert main([*dying, *sampling]) == 2
        said = capsys.readouterr().err
        assert "completions: RemoteDisconnected" in said and "Traceback" not in said
        server.sample.left = 10**6
        assert main([*dying, *sampling]) == 0
        assert "2 of 5 completions are in" in capsys.readouterr().out
        assert main([*dying, *sampling, "--n", "2"]) == 0
        events = len(server.events)
        assert main([*dying, *sampling, "--n", "2", "--checker", "number"]) == 0
        assert len(server.events) == events  # nothing was missing: nobody is asked
    kept = [
        {(line["question"], line["sample"]): line["text"] for line in map(json.loads, file.open())}
        for file in (tmp_path / "whole/completions.jsonl", tmp_path / "dying/completions.jsonl")
    ]
    assert kept[0] == kept[1] and len(kept[0]) == 10 and len(set(kept[0].values())) > 5
    # the embedded engine's answers are others: one folder has those of one of them
    assert main([*dying[: dying.index("--use_vllm")], *sampling, "--n", "2"]) == 2
    assert "engine was 'vllm', is now None" in capsys.readouterr().err


def test_a_server_of_another_model(folder, model, adapted, data, tmp_path, capsys):
    base = copy.copy(adapted)
    base.base = without_adapter(adapted.base)
    adapted.save_pretrained(tmp_path / "adapter")
    with StubVLLM(Sampler(model, shift=1.5), max_model_len=512) as server:
        assert main(flags(folder, data, tmp_path / "1", server)) == 2
        assert "differ by 1.5 on average" in capsys.readouterr().err
    with StubVLLM(Sampler(base), max_model_len=512) as server:
        assert (
            main([*flags(tmp_path / "adapter", data, tmp_path / "2", server), "--load_in_4bit", "False"]) == 2
        )
        assert "vLLM samples without the adapter" in capsys.readouterr().err
    with StubVLLM(max_model_len=20) as server:
        assert main(flags(folder, data, tmp_path / "3", server)) == 2
        assert "vLLM at " in (said := capsys.readouterr().err) and "takes 20 tokens" in said
    assert main(flags(folder, data, tmp_path / "4", server)) == 2
    assert "is not up after 5 s" in capsys.readouterr().err
    assert not (tmp_path / "2/completions.jsonl").exists()


def test_a_server_is_started_and_ended(folder, data, tmp_path, capsys, monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(name, "")
    command = [str(folder), "--data", str(data), "--output_dir", str(tmp_path / "out"), "--instruction", ""]
    command += ["--max_new_tokens", "8", "--use_vllm", "--vllm_server_args=--enforce-eager"]
    command += ["--vllm_logprob_limit", "None", "--limit", "2", "--vllm_python"]
    assert main([*command, python_with_vllm(tmp_path, "import sys\nsys.exit('no memory is left')")]) == 2
    said = capsys.readouterr().err
    assert "vLLM ended while it was starting\nthe server has ended with code 1" in said
    assert "  no memory is left" in said
    assert os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.60"  # of a GPU: 0.3 are the server's
    assert main([*command, python_with_vllm(tmp_path)]) == 0
    assert "more than vllm_logprob_warning=0.1" in capsys.readouterr().err  # the stub is no such model
    assert (tmp_path / "out/vllm.log").read_text() == "listening\n"
    assert len((tmp_path / "out/completions.jsonl").read_text().splitlines()) == 2
    settings = json.loads((tmp_path / "out/results.json").read_text())["settings"]
    assert settings["vllm_server_args"] == ["--enforce-eager"]
    assert main([*command, "/no/such/python", "--n", "2", "--temperature", "1"]) == 2
    assert main([*command, "/no/such/python", "--limit", "5"]) == 2
    assert "/no/such/python is no program" in capsys.readouterr().err
