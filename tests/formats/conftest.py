"""Checkpoints for the reader tests: tiny random models written by the library whose files jaxtune reads."""

from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch


def state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The model's weights as float32 arrays."""
    return {name: value.float().numpy() for name, value in model.state_dict().items()}


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """A bfloat16 llama folder of one file, and its weights."""
    model = tiny_models.make_model(tiny_models.make_config("llama")).to(torch.bfloat16)
    folder = tiny_models.save(model, tmp_path_factory.mktemp("llama"))
    return folder, state(model)


@pytest.fixture
def sharded(tmp_path) -> tuple[Path, dict[str, np.ndarray]]:
    """The same in several shards; a fresh folder, to be broken."""
    model = tiny_models.make_model(tiny_models.make_config("llama")).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    return tmp_path / "sharded", state(model)
