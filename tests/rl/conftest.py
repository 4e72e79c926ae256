"""Fixtures of the reinforcement-learning tests."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compilation(tmp_path_factory):
    """Compile without most optimisations, and the same step once for all tests of a module."""
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
