"""Compiled programs are kept in the user's cache folder, so that the second run starts at once."""

import os
from pathlib import Path

import jax

SWITCH = "JAXTUNE_COMPILE_CACHE"  # a folder, or 0 to keep nothing


def cache_folder() -> Path | None:
    """JAXTUNE_COMPILE_CACHE, or jaxtune/ under XDG_CACHE_HOME (~/.cache); None if the user wants none."""
    chosen = os.environ.get(SWITCH, "")
    if chosen == "0":
        return None
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxtune"


def enable_compile_cache() -> None:
    """Lets JAX keep compiled programs and XLA its choice of matrix kernels; called where models are loaded.

    Does nothing where the user has set jax_compilation_cache_dir already, or JAXTUNE_COMPILE_CACHE=0.
    """
    chosen = cache_folder()
    if chosen is None or jax.config.jax_compilation_cache_dir is not None:
        return
    folder = chosen / "programs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(folder, os.W_OK):  # no home to write to: every run compiles
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    gpu = jax.default_backend() == "gpu"
    # Loading and setting up are dozens of small programs; on a GPU each takes 0.1 s or more to compile.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0 if gpu else 0.5)
    if gpu:
        jax.config.update("jax_persistent_cache_enable_xla_caches", "xla_gpu_per_fusion_autotune_cache_dir")
