"""What JAX is told to take of a GPU, before it looks for one."""

import os

import pytest

from jaxtune import gpu_memory
from jaxtune.command_line import Job
from jaxtune.fast import FastLanguageModel
from jaxtune.rl.command_line import GRPOJob
from jaxtune.rl.config import GRPOConfig

NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # also puts the environment back as it was


def said():
    return tuple(os.environ[name] for name in NAMES)


def test_loading_a_model_claims_it(tmp_path):
    with pytest.raises(OSError):
        FastLanguageModel.from_pretrained(str(tmp_path / "nothing"))
    assert said() == ("0.90", "")


@pytest.mark.parametrize("name", NAMES)
def test_what_the_user_has_set_stays(monkeypatch, name):
    """JAX refuses both names together."""
    monkeypatch.setenv(name, "0.5")
    gpu_memory.claim()
    assert sorted(said()) == ["", "0.5"] and os.environ[name] == "0.5"


@pytest.mark.parametrize("share, left", [(0.3, "0.60"), (0.95, "0.10")])
def test_a_vllm_of_the_run_gets_its_part(share, left):
    ours = dict(use_vllm=True, vllm_python="python", vllm_gpu_memory_utilization=share)
    gpu_memory.claim(GRPOJob(training=GRPOConfig(**ours)).share_beside_jax)
    assert said() == (left, "")


def test_nothing_else_takes_a_part():
    server = GRPOConfig(use_vllm=True, vllm_mode="server", vllm_server_base_url="http://there:8000")
    for job in (Job(), GRPOJob(), GRPOJob(training=server)):
        assert job.share_beside_jax == 0
