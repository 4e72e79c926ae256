"""Compiled programs are kept between processes, where the user wants it."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax, jax.numpy as jnp
from jaxtune.compile_cache import enable_compile_cache
{before}
enable_compile_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((64, 64))).block_until_ready()
print(len(hits))
"""


def run(folder, before="", **environment):
    """How many programs a process took from the cache."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "HOME": str(folder), **environment}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before)], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("variable", ["JAXTUNE_COMPILE_CACHE", "XDG_CACHE_HOME", "HOME"])
def test_the_second_process_compiles_nothing(tmp_path, variable):
    places = {"JAXTUNE_COMPILE_CACHE": "", "XDG_CACHE_HOME": ""} | {variable: str(tmp_path)}
    assert run(tmp_path, **places) == 0
    assert run(tmp_path, **places) > 0
    folder = {"JAXTUNE_COMPILE_CACHE": "programs", "XDG_CACHE_HOME": "jaxtune", "HOME": ".cache"}[variable]
    assert (tmp_path / folder).is_dir()


def test_nothing_is_kept_when_it_is_switched_off(tmp_path):
    run(tmp_path, JAXTUNE_COMPILE_CACHE="0", XDG_CACHE_HOME="")
    assert not list(tmp_path.iterdir())


def test_the_users_own_cache_is_left_alone(tmp_path):
    before = f'jax.config.update("jax_compilation_cache_dir", {str(tmp_path / "own")!r})'
    run(tmp_path, before, JAXTUNE_COMPILE_CACHE=str(tmp_path / "ours"))
    assert (tmp_path / "own").is_dir() and not (tmp_path / "ours").exists()


def test_a_home_that_cannot_be_written_costs_nothing_else(tmp_path):
    (tmp_path / "file").write_text("")
    assert run(tmp_path, JAXTUNE_COMPILE_CACHE=str(tmp_path / "file")) == 0
    assert run(tmp_path, "import os; os.access = lambda *_: False", JAXTUNE_COMPILE_CACHE=str(tmp_path)) == 0
    assert not list((tmp_path / "programs").iterdir())
