"""vLLM rollouts against a stub of its server: the protocol, versions, every way to fail, the process, the trainer."""

import copy
import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_vision
from tolerances import SAMPLER_GAP
from vllm_stub import EOS, StubVLLM, python_with_vllm

from jaxtune.fast import FastLanguageModel
from jaxtune.generate import Engine, Sampling
from jaxtune.lora import adapter_tensors
from jaxtune.rl import vllm_process
from jaxtune.rl.config import GRPOConfig
from jaxtune.rl.reference import without_adapter
from jaxtune.rl.rollout import Request
from jaxtune.rl.trainer import GRPOTrainer
from jaxtune.rl.vllm_engine import check_base, save_policy_base, served_folder
from jaxtune.rl.vllm_rollout import VLLMRollout
from jaxtune.rl.vllm_server import VLLMError, VLLMProcess, VLLMServer

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"prompt": [{"role": "user", "content": "say " + "xy" * i}]} for i in range(6)]
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def base(tiny_model_dir, quick_compilation):
    folder = tiny_model_dir("llama", num_hidden_layers=1)
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=128, dtype="float32")[0]


def with_adapter(base, **settings):
    defaults = {"r": 4, "lora_dropout": 0.0, "target_modules": ["q_proj", "down_proj"]}
    return FastLanguageModel.get_peft_model(base, **defaults | settings)


@pytest.fixture
def model(base):
    return with_adapter(base)


def config(folder, url=None, **settings):
    where = {"vllm_mode": "colocate"} if url is None else {"vllm_mode": "server", "vllm_server_base_url": url}
    defaults = {
        "use_vllm": True, "max_completion_length": 10, "num_generations": 2, "vllm_server_timeout": 0.5,
        "per_device_train_batch_size": 4, "vllm_adapter_dir": str(folder / "adapters"),
    }  # fmt: skip
    return GRPOConfig(str(folder), **defaults | where | settings)


def request(ids, group=2, seed=3):
    ids = [row for row in ids for _ in range(group)]
    return Request(["" for _ in ids], ids, group, seed, 10)


# -- the protocol --------------------------------------------------------------------------------------------


def test_every_version_has_a_name_and_a_folder_of_its_own(model, tmp_path):
    with StubVLLM() as server:
        rollout = VLLMRollout(model, config(tmp_path, server.url))
        rollout.sync(0)
        (first,) = server.adapters
        fields, tensors = server.adapters[first]
        assert (fields["peft_type"], fields["r"]) == ("LORA", 4)
        expected = adapter_tensors(model)
        assert tensors.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(tensors[name], value)
        model.trainable = {path: value + 1 for path, value in model.trainable.items()}
        rollout.sync(1)
        (second,) = server.adapters
        assert first != second
        np.testing.assert_array_equal(server.adapters[second][1][name], value + 1)
        (room,) = (tmp_path / "adapters").iterdir()
        assert [folder.name for folder in room.iterdir()] == [second]
        loads = [("load_lora_adapter", first), ("load_lora_adapter", second), ("unload_lora_adapter", first)]
        assert server.events == loads
        rollout.generate(request([[7, 8]]))
        assert server.events[-1] == ("completions", second)
        rollout.close()
        assert not server.adapters and not list((tmp_path / "adapters").iterdir())
        rollout.generate(request([[7, 8]]))  # as evaluate() after train() does
        assert len(server.adapters) == 1 and server.adapters.keys() != {first, second}
        rollout.close()


def test_completions_and_what_is_asked_for(model, tmp_path):
    settings = {"temperature": 0.7, "generation_kwargs": {"stop": ["\n"], "max_tokens": 6}}
    prompts = [[10, 11], [20, 21, 22], [10, 11]]
    with StubVLLM() as server:
        rollout = VLLMRollout(model, config(tmp_path, server.url, **settings))
        rollout.sync(0)
        made = rollout.generate(request(prompts))
        again = rollout.generate(request(prompts))
        other = rollout.generate(request(prompts, seed=4))
        rollout.close()
    assert made.prompt_ids == [row for row in prompts for _ in range(2)]
    assert [len(ids) for ids in made.completion_ids] == [4] * 6
    assert all(ids[-1] == EOS for ids in made.completion_ids)
    assert made.logprobs == [[-0.5, -1.5, -2.5, -3.5]] * 6
    assert made == again != other
    assert server.most_together > 1
    asked = sorted(server.payloads[:3], key=lambda payload: payload["prompt"])
    assert [payload["prompt"] for payload in asked] == sorted(prompts)
    assert len({payload["seed"] for payload in asked}) == 3  # two prompts are equal
    assert all(payload["n"] == 2 and payload["max_tokens"] == 6 for payload in asked)
    fields = {"temperature": 0.7, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    fields |= {"stop": ["\n"], "stop_token_ids": [EOS], "logprobs": 0, "return_token_ids": True}
    assert fields.items() <= asked[0].items()


def test_log_probabilities_of_what_was_kept_are_not_given(model, tmp_path):
    with StubVLLM() as server:
        with pytest.warns(UserWarning, match="cannot be compared with the trainer's"):
            rollout = VLLMRollout(model, config(tmp_path, server.url, top_k=5))
        rollout.sync(0)
        made = rollout.generate(request([[7, 8]]))
        rollout.close()
    assert all(math.isnan(x) for row in made.logprobs for x in row)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = VLLMRollout(model, config(tmp_path, top_k=5, vllm_python=sys.executable))
    arguments = " ".join(own.engine._server_arguments(tmp_path, 1))
    assert "--logprobs-mode raw_logprobs" in arguments and "--gpu-memory-utilization 0.3" in arguments
    assert "--enable-lora --max-lora-rank 8" in arguments


# -- failures ------------------------------------------------------------------------------------------------


def nonsense(handler):
    handler.answer("<html>hello</html>")


def without_ids(handler):
    handler.answer({"choices": [{"index": i, "text": "a"} for i in range(2)]})


def hang(handler):
    time.sleep(3)


def drop(handler):
    handler.connection.close()


@pytest.mark.parametrize(
    ("route", "answer", "message"),
    [
        ("/v1/models", lambda h: h.answer({"data": [{"id": "gpt"}]}), "no model with its max_model_len"),
        ("/v1/models", nonsense, "answered no JSON: '<html>hello"),
        ("load_lora_adapter", lambda h: h.refuse(500, "rank 4 is too large"), "status 500: rank 4 is too large"),
        ("completions", lambda h: h.refuse(400, "token id 7 is out of vocabulary"), "token id 7 is out of"),
        ("completions", without_ids, "not what was asked for .KeyError: 'token_ids'"),
        ("completions", lambda h: h.answer({"choices": []}), "0 samples instead of 2"),
        ("completions", hang, "no answer within 0.4"),
        ("completions", drop, "RemoteDisconnected"),
    ],
)  # fmt: skip
def test_a_wrong_slow_or_dying_server(model, tmp_path, route, answer, message):
    with StubVLLM() as server:
        server.answers[route] = answer
        rollout = VLLMRollout(model, config(tmp_path, server.url, vllm_request_timeout=0.45))
        began = time.monotonic()
        with pytest.raises(VLLMError, match=message):
            rollout.sync(0)
            rollout.generate(request([[7, 8], [9, 9], [3, 4]]))
        assert time.monotonic() - began < 2
        server.answers.clear()
        rollout.sync(1)  # and on it goes
        assert len(rollout.generate(request([[7, 8]])).completion_ids) == 2
        rollout.close()


def test_a_server_that_is_not_there_or_not_fit(model, tmp_path):
    with StubVLLM(max_model_len=100, takes_adapters=False) as server:
        url = server.url
        with pytest.raises(
            VLLMError, match="takes 100 tokens, 128 are needed; start it with --max-model-len 128"
        ):
            VLLMRollout(model, config(tmp_path, url)).sync(0)
        short = VLLMRollout(model, config(tmp_path, url, vllm_max_model_length=100))
        with pytest.raises(VLLMError, match="status 404: Not Found") as caught:
            short.sync(0)
        assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" in caught.value.__notes__[0]
        assert "--enable-lora --max-lora-rank 4" in caught.value.__notes__[0]
        server.takes_adapters = True
        short.sync(0)
        with pytest.raises(VLLMError, match="a prompt has 100 tokens and vLLM takes 100"):
            short.generate(request([[5] * 100]))
        short.generate(request([[5] * 99]))
        assert server.payloads[-1]["max_tokens"] == 1
        short.close()
    gone = VLLMRollout(model, config(tmp_path, url))
    with pytest.raises(VLLMError, match=f"vLLM at {url} is not up after 0.5 s .*Connection refused"):
        gone.sync(0)
    with pytest.raises(ValueError, match="expected an address such as"):
        VLLMServer("localhost:8000")


def test_what_vllm_cannot_serve(base, tiny_model_dir, tmp_path):
    def refused(model, message, **settings):
        with pytest.raises(ValueError, match=message):
            VLLMRollout(model, config(tmp_path, **{"vllm_python": sys.executable} | settings))

    refused(base, "needs an adapter .*the embedded engine samples from any adapter")
    refused(with_adapter(base, use_dora=True), "does not serve DoRA adapters .*leave use_vllm out")
    refused(with_adapter(base, modules_to_save=["lm_head"]), "trained whole .modules_to_save=lm_head")
    wide = with_adapter(base)
    wide.lora = dataclasses.replace(wide.lora, r=1024)
    refused(wide, "ranks up to 512, the adapter has r=1024")
    refused(with_adapter(base), "/no/such/python is no program; install vLLM", vllm_python="/no/such/python")
    with pytest.raises(ValueError, match="vllm_request_timeout must be above 0"):
        config(tmp_path, vllm_request_timeout=0)


def test_no_vllm_here(model, tmp_path, monkeypatch):
    monkeypatch.delenv("JAXTUNE_VLLM_PYTHON", raising=False)
    with pytest.raises(ValueError, match="vLLM is not installed here; install vLLM in an environment of its"):
        VLLMRollout(model, config(tmp_path))


# -- a server of one's own -----------------------------------------------------------------------------------


@pytest.fixture
def fake_python(tmp_path):
    return functools.partial(python_with_vllm, tmp_path)


def is_alive(pid):
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_server_is_started_and_ended(model, tmp_path, fake_python):
    python = fake_python()
    rollout = VLLMRollout(model, config(tmp_path, vllm_python=python, vllm_server_timeout=60))
    rollout.sync(0)
    made = rollout.generate(request([[7, 8]]))
    assert len(made.completion_ids) == 2
    assert "listening" in (tmp_path / "vllm.log").read_text()
    pid = rollout.engine._server._process._process.pid
    assert is_alive(pid)
    os.kill(pid, 9)
    with pytest.raises(
        VLLMError, match=r"the server has ended with code -9; the end of .*vllm.log:\n  listening"
    ):
        while True:  # until the signal has arrived
            rollout.generate(request([[7, 8]]))
    rollout.close()
    assert not list((tmp_path / "adapters").iterdir())


def test_a_server_that_does_not_start(model, tmp_path, fake_python):
    python = fake_python("import sys\nprint('loading')\nsys.exit('no memory is left')")
    rollout = VLLMRollout(model, config(tmp_path, vllm_python=python, vllm_server_timeout=60))
    message = (
        r"vLLM ended while it was starting\nthe server has ended with code 1; .*\n  loading\n  no memory"
    )
    with pytest.raises(VLLMError, match=message):
        rollout.sync(0)
    slow = fake_python("import time\nprint('still loading')\ntime.sleep(60)")
    rollout = VLLMRollout(model, config(tmp_path, vllm_python=slow, vllm_server_timeout=0.5))
    with pytest.raises(
        VLLMError, match=r"is not up after 0\.5 s .*raise vllm_server_timeout\nthe server is running"
    ):
        rollout.sync(0)


def test_a_server_that_finds_no_memory(model, tmp_path, fake_python):
    python = fake_python(
        "import sys\nprint('ValueError: Free memory on device cuda:0 (9.1/79.2 GiB) on startup is less than "
        "desired GPU memory utilization (0.3, 23.76 GiB).')\nprint('trace\\n' * 30)\nsys.exit(1)"
    )
    rollout = VLLMRollout(model, config(tmp_path, vllm_python=python, vllm_server_timeout=60))
    with pytest.raises(VLLMError, match=r"starting: too little .* start Python with XLA_CLIENT_MEM_FRACTION"):
        rollout.sync(0)


def test_the_server_goes_with_the_trainer(tmp_path, fake_python):
    """Whatever ends the trainer closes the pipe; the server, its own children and the folders go."""
    code = "import subprocess\np = subprocess.Popen(['sleep', '60'])\nprint(p.pid, flush=True)\np.wait()"
    python, folder = fake_python(code), tmp_path / "adapters"
    folder.mkdir()
    parent = (
        "import sys, time; from pathlib import Path; from jaxtune.rl.vllm_server import VLLMProcess\n"
        f"p = VLLMProcess({python!r}, [], Path({str(tmp_path / 'log')!r}), [Path({str(folder)!r})])\n"
        "print(p._process.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, cwd=ROOT) as trainer:
        server = int(trainer.stdout.readline())
        while not (tmp_path / "log").read_text().strip():
            time.sleep(0.02)
        trainer.kill()
    pids = [server, int((tmp_path / "log").read_text())]
    deadline = time.monotonic() + 2 * vllm_process.GRACE
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, pids))
    assert not folder.exists()


def test_ending_a_process_that_does_not_listen(tmp_path, fake_python, monkeypatch):
    monkeypatch.setattr(vllm_process, "GRACE", 0.2)
    code = "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('deaf', flush=True)\ntime.sleep(60)"
    process = VLLMProcess(fake_python(code), [], tmp_path / "log")
    while "deaf" not in (tmp_path / "log").read_text():
        time.sleep(0.02)
    process.close()
    assert process.ended() == -9


# -- the base ------------------------------------------------------------------------------------------------


def test_the_base_that_is_served_is_the_policys(tiny_model_dir, tmp_path):
    import torch
    import transformers
    from tolerances import LOGITS

    folder = tiny_model_dir("llama", num_hidden_layers=1)
    loaded = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, dtype="float32", load_in_4bit=True
    )
    model = with_adapter(loaded[0], init_lora_weights=False)
    args = config(tmp_path, vllm_python=sys.executable)
    assert served_folder(model, args) is None
    assert served_folder(model, dataclasses.replace(args, vllm_base="checkpoint")) == model.checkpoint.path
    ids = np.arange(3, 23)[None]
    save_policy_base(model, tmp_path / "base")
    judge = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = judge(torch.from_numpy(ids)).logits.numpy()
    plain = np.asarray(loaded[0].logits(ids))  # the same base before the adapter
    assert np.abs(theirs - plain).max() <= LOGITS * np.abs(plain).max()
    assert np.abs(np.asarray(model.logits(ids)) - plain).max() > 1e-2  # which does something


def test_of_a_text_model_in_a_larger_one_the_policys_weights_are_served(tmp_path):
    folder = tiny_vision.save(tiny_vision.make_model(tiny_vision.make_config("qwen3_vl")), tmp_path / "whole")
    model = FastLanguageModel.from_pretrained(
        str(folder), text_only=True, max_seq_length=64, dtype="float32", load_in_4bit=False
    )[0]
    args = config(tmp_path, vllm_python=sys.executable)
    assert served_folder(model, args) is None
    with pytest.raises(ValueError, match="text_only=True trains its text model; use vllm_base='policy'"):
        check_base(model, dataclasses.replace(args, vllm_base="checkpoint"))
    save_policy_base(model, tmp_path / "base")
    assert json.loads((tmp_path / "base" / "config.json").read_text())["model_type"] == "qwen3"
    model = with_adapter(model)
    with StubVLLM() as server:  # of that folder
        rollout = VLLMRollout(model, config(tmp_path, server.url))
        rollout.sync(0)
        ((fields, tensors),) = server.adapters.values()
        rollout.close()
    assert tensors.keys() == adapter_tensors(model).keys()
    assert fields["target_modules"] == ["q_proj", "down_proj"]


def test_a_model_without_4_bits_is_served_as_it_is(tiny_model_dir, tmp_path):
    folder = tiny_model_dir("llama", num_hidden_layers=1)
    model = FastLanguageModel.from_pretrained(str(folder), dtype="float32", load_in_4bit=False)[0]
    assert served_folder(model, config(tmp_path, vllm_python=sys.executable)) == model.checkpoint.path


# -- the trainer ---------------------------------------------------------------------------------------------


def odd(completion_ids, **_):
    return [float(sum(ids) % 3) for ids in completion_ids]


class Sampler:
    """The stub's sampler: samples from a trainer's model, and reports log-probabilities that are off, step by step."""

    def __init__(self, shifts=(0.0,) * 4, ignores_adapter=False):
        self.trainer, self.shifts, self.calls, self.dies_after = None, shifts, 0, math.inf
        self.ignores_adapter = ignores_adapter
        self.lock = threading.Lock()

    def __call__(self, payload, number):
        with self.lock:
            self.calls += 1
            if self.calls > self.dies_after:
                raise ConnectionError
            model = copy.copy(self.trainer.model)
            if self.ignores_adapter:
                model.base = without_adapter(model.base)
            made = Engine(model, progress=False).generate(
                [payload["prompt"]],
                sampling=Sampling(do_sample=True),
                max_new_tokens=payload["max_tokens"],
                seed=payload["seed"] + number,
            )[0]
        shift = self.shifts[self.trainer.state.global_step]
        return made.token_ids, [float(x) + shift for x in made.logprobs]


def make_trainer(base, folder, url, sampler, **settings):
    defaults = {
        "max_steps": 2, "learning_rate": 0.02, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        "max_completion_length": 6, "vllm_server_timeout": 5,
    }  # fmt: skip
    trainer = GRPOTrainer(with_adapter(base), odd, config(folder, url, **defaults | settings), ROWS)
    sampler.trainer = trainer
    return trainer


def steps(trainer):
    return [record for record in trainer.state.log_history if "loss" in record]


def test_training_and_a_server_that_dies(base, tmp_path):
    sampler = Sampler()
    with StubVLLM(sampler) as server:
        whole = make_trainer(base, tmp_path / "whole", server.url, sampler)
        whole.train()
        names = [name for route, name in server.events if route == "load_lora_adapter"]
        assert len(set(names)) == 2  # one a step
        assert not server.adapters
        for record in steps(whole):
            assert record["sampling/sampling_logp_difference/max"] < SAMPLER_GAP
            assert record["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3)
        dying = make_trainer(base, tmp_path / "dying", server.url, sampler)
        sampler.dies_after = sampler.calls + 6  # 4 completions a step
        with pytest.raises(VLLMError, match="completions: RemoteDisconnected") as caught:
            dying.train()
        assert any("up to step 1 is saved" in note for note in caught.value.__notes__)
        sampler.dies_after = math.inf
        resumed = make_trainer(base, tmp_path / "dying", server.url, sampler)
        resumed.train(resume_from_checkpoint=True)
    for ours, theirs in zip(
        jax.tree.leaves(resumed.model.trainable), jax.tree.leaves(whole.model.trainable), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_the_difference_is_measured_warned_about_and_bounded(base, tmp_path):
    sampler = Sampler(shifts=(0.0, 0.25, 0.25, 1.5))
    settings = {"vllm_importance_sampling_correction": False, "max_steps": 4}
    with StubVLLM(sampler) as server:
        trainer = make_trainer(base, tmp_path, server.url, sampler, **settings)
        with (
            pytest.warns(UserWarning, match="differ by 0.25 on average .*vllm_logprob_warning=0.1") as seen,
            pytest.raises(
                VLLMError, match=r"differ by 1\.5 .*vllm_logprob_limit=1.0: the server has another"
            ),
        ):
            trainer.train()
    assert sum("differ by" in str(one.message) for one in seen) == 1
    gaps = [record["sampling/sampling_logp_difference/mean"] for record in steps(trainer)]
    assert gaps == pytest.approx([0, 0.25, 0.25], abs=1e-3)
    assert "sampling/importance_sampling_ratio/mean" not in steps(trainer)[0]


def test_a_server_that_loads_adapters_and_does_not_use_them(base, tmp_path):
    sampler = Sampler(ignores_adapter=True, shifts=(0.0,) * 9)
    with StubVLLM(sampler) as server:
        trainer = make_trainer(base, tmp_path, server.url, sampler, max_steps=8)
        with pytest.raises(VLLMError, match="vLLM samples without the adapter as trained"):
            trainer.train()
    assert 0 < trainer.state.global_step < 8


def test_an_unknown_difference_is_not_logged(base, tmp_path):
    sampler = Sampler()
    with StubVLLM(sampler) as server, pytest.warns(UserWarning, match="cannot be compared"):
        trainer = make_trainer(base, tmp_path, server.url, sampler, top_p=0.9, max_steps=1)
        trainer.train()
    (record,) = steps(trainer)
    assert "sampling/sampling_logp_difference/mean" not in record
    assert record["sampling/importance_sampling_ratio/mean"] == 1  # nothing is corrected


def test_an_evaluation_that_fails_loses_nothing(base, tmp_path):
    sampler = Sampler()
    settings = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}
    with StubVLLM(sampler) as server:
        args = {"max_steps": 3, "learning_rate": 0.02, "save_strategy": "no", "disable_tqdm": True}
        args |= {"max_completion_length": 6}
        trainer = GRPOTrainer(
            with_adapter(base),
            odd,
            config(tmp_path, server.url, **args, **settings),
            ROWS,
            eval_dataset=ROWS[:1],
        )
        sampler.trainer = trainer
        sampler.dies_after = 9
        with pytest.raises(VLLMError) as caught:
            trainer.train()
    assert any("up to step 2 is saved" in note for note in caught.value.__notes__)
    assert (tmp_path / "checkpoint-2").is_dir()
