"""Write a model as .gguf files: one pass over the weights, every method's file at once.

Each merged tensor is made once and quantised once for each type that one of the files wants. While it is quantised
the next one is made, and the one before goes to disk.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
from gguf.constants import GGMLQuantizationType as Kind
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from jaxtune.export import ollama, quantisers_jax
from jaxtune.export.gguf_adapter import save_gguf_adapter
from jaxtune.export.gguf_conversion import Conversion, convert
from jaxtune.export.gguf_format import GgufWriter, TensorEntry
from jaxtune.export.gguf_metadata import file_metadata
from jaxtune.export.imatrix import ImportanceMatrix, load_or_collect
from jaxtune.export.merged import Base
from jaxtune.export.mmproj import check_mmproj, save_mmproj
from jaxtune.export.quantise_pool import QuantisePool
from jaxtune.export.type_mix import METHODS, bits_per_weight, file_type, find_method, tensor_kinds
from jaxtune.export.verify import QUESTION, Verification, installed_llama_cpp
from jaxtune.export.verify import verify as verify_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxtune.model import Model

MODELFILE = "Modelfile"
# On a GPU: while one is merged, another is quantised and the blocks of a third are on their way to the host.
TENSORS_AT_ONCE = 3
_HEADROOM = 50_000_000  # bytes kept free for the Modelfile and the file system
Weights = np.ndarray | jax.Array


@dataclass(frozen=True)
class _File:
    """One file to write: its method, its place, and the type of each tensor."""

    method: str
    path: Path
    kinds: dict[str, Kind]

    def entries(self, shapes: dict[str, tuple[int, ...]]) -> list[TensorEntry]:
        return [TensorEntry(name, shape, self.kinds[name]) for name, shape in shapes.items()]


def save_gguf(
    model: Model,
    directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantization_method: str | Sequence[str] = "fast_quantized",
    *,
    imatrix: Any = None,
    system: str | None = None,
    verify: bool | str = False,
    name: str | None = None,
    pre_tokenizer: str | None = None,
    base: Base = "dequantised",
    overwrite: bool = False,
    deterministic: bool = False,
    processes: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Write a model with its adapter merged in as .gguf files, with an Ollama Modelfile.

    Of a vision-language model those are the files of its language part; tower and projector are one file beside them,
    for llama.cpp's --mmproj, in 16 bits.

    Args:
        model: with or without an adapter.
        directory: folder for `<name>.<METHOD>.gguf` and `Modelfile`; made if need be, other files stay.
        tokenizer: goes into the files, or that of a processor; by default the model's.
        quantization_method: a name of `type_mix.METHODS`, or several: all are made in one pass over the weights.
        imatrix: an `ImportanceMatrix`, a file of one (of llama-imatrix or `ImportanceMatrix.save`), or rows as for
            `SFTTrainer` to collect one from.
        system: the Modelfile's system prompt.
        verify: run the files in an installed llama.cpp and compare (see `export.verify`); a text is the question.
        name: beginning of the file names and the model's name in them; by default the base model's.
        pre_tokenizer: llama.cpp's name for the tokenizer's splitting rules, where jaxtune does not know them.
        base: what the adapter is merged onto, as in `save_merged`.
        overwrite: replace files of those names; without it they raise.
        deterministic: quantise on the CPU, byte for byte as llama.cpp does. Without it a GPU does the K-quants, the
            same algorithm, in which a few blocks may round otherwise.
        processes: to quantise on the CPU; by default one for each core.
        progress: show a progress bar, a table of the files and the commands that run them.

    Returns:
        Unsloth's keys: save_directory, gguf_directory, gguf_files, modelfile_location, want_full_precision, is_vlm,
        fix_bos_token; and verifications, a list of `verify.Verification`.

    Raises:
        ValueError: an unknown method; a model or tokenizer that GGUF cannot hold; an importance matrix of another
            model; NaN, infinity or a number too large for its type. FileExistsError: a file is there already.
        FileNotFoundError: verify without a llama.cpp. OSError: the disk is too full. In every case no file is made.
    """
    from jaxtune.data.responses import chat_tokenizer  # here because it brings transformers, and that torch

    methods = _methods(quantization_method, model)
    if verify:
        installed_llama_cpp()
    folder, given = Path(directory).expanduser(), tokenizer or model.tokenizer
    tokenizer = None if given is None else chat_tokenizer(given)
    conversion = convert(model, tokenizer, base=base, name=name, pre_tokenizer=pre_tokenizer)
    stem = _stem(name or model.name_or_path)
    targets = {method: folder / f"{stem}.{method.upper()}.gguf" for method in methods}
    modelfile = _modelfile_path(folder, methods[0], overwrite)
    is_vlm = hasattr(model.config, "vision_config")
    sixteen = _methods("not_quantized", model)[0]
    projector = [folder / f"{stem}.{sixteen.upper()}-mmproj.gguf"] if is_vlm else []
    if is_vlm:
        check_mmproj(model)
    _check_targets([*targets.values(), *projector, modelfile], overwrite)
    text = _modelfile_text(model, tokenizer, list(targets.values()), system)
    matrix = None if imatrix is None else load_or_collect(imatrix, model, tokenizer, progress=progress)
    files = [_File(method, path, _kinds(method, conversion, matrix)) for method, path in targets.items()]
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    _write(conversion, files, matrix, deterministic, processes, progress)
    for path in projector:
        save_mmproj(model, path, dtype="bf16" if sixteen == "bf16" else "f16", base=base, name=name)
    modelfile.write_text(text, "utf-8")
    if progress:
        _report(files, conversion, time.perf_counter() - started, modelfile)
    return {
        "save_directory": str(folder),
        "gguf_directory": str(folder),
        "gguf_files": [str(path) for path in (*targets.values(), *projector)],
        "modelfile_location": str(modelfile),
        "want_full_precision": all(method in ("f32", "f16", "bf16") for method in methods),
        "is_vlm": is_vlm,
        "fix_bos_token": False,
        "verifications": _verify(model, files, tokenizer, verify, progress) if verify else [],
    }


def _verify(
    model: Model, files: Sequence[_File], tokenizer, question: bool | str, progress: bool
) -> list[Verification]:
    question = question if isinstance(question, str) else QUESTION
    found = verify_files(model, [file.path for file in files], tokenizer, question=question)
    if progress:
        print(*found, sep="\n")
    return found


def _modelfile_text(model: Model, tokenizer, files: Sequence[Path], system: str | None) -> str:
    names = [path.name for path in files]
    settings = model.checkpoint.generation_config
    return ollama.modelfile(tokenizer, names[0], others=names[1:], system=system, generation=settings)


def save_lora_gguf(
    model: Model,
    directory: str | Path,
    *,
    name: str | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the adapter alone as `<name>.LORA.gguf`, for llama.cpp's --lora; Ollama takes merged models only.

    Args:
        name: beginning of the file name; by default the base model's.
        dtype: of the adapter's matrices.

    Returns:
        save_directory, gguf_directory, gguf_files.

    Raises:
        ValueError: no adapter, or one that llama.cpp cannot apply. FileExistsError: the file is there already.
    """
    folder = Path(directory).expanduser()
    path = folder / f"{_stem(name or model.name_or_path)}.LORA.gguf"
    folder.mkdir(parents=True, exist_ok=True)
    save_gguf_adapter(model, path, dtype=dtype, overwrite=overwrite)
    if progress:
        print(f"{path}: {path.stat().st_size / 1e6:,.1f} MB\nRun it:\n  llama-cli -m BASE.gguf --lora {path}")
    return {"save_directory": str(folder), "gguf_directory": str(folder), "gguf_files": [str(path)]}


def _methods(given: str | Sequence[str], model: Model) -> list[str]:
    """Canonical names; "not_quantized" is what the model is in."""
    wanted = [given] if isinstance(given, str) else list(given)
    if not wanted:
        raise ValueError("quantization_method is empty; name at least one, such as 'q8_0'")
    own = "bf16" if np.dtype(model.dtype).name == "bfloat16" else "f16"
    return [own if name.lower() == "not_quantized" else find_method(name).name for name in wanted]


def _stem(name: str) -> str:
    """The last part of a path or hub id, without what a .gguf file's name says about its type."""
    stem = name.replace("\\", "/").rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    start, dot, method = stem.rpartition(".")
    return start if dot and method.lower() in METHODS else stem


def _check_targets(paths: Sequence[Path], overwrite: bool) -> None:
    there = [str(path) for path in paths if path.exists()]
    if there and not overwrite:
        raise FileExistsError(f"{', '.join(there)} exists already; pass overwrite=True to replace it")


def _modelfile_path(folder: Path, method: str, overwrite: bool) -> Path:
    """`Modelfile`; where that is there from another export, one with the method in its name."""
    path = folder / MODELFILE
    return path if overwrite or not path.exists() else folder / f"{MODELFILE}.{method.upper()}"


def _kinds(method: str, conversion: Conversion, matrix: ImportanceMatrix | None) -> dict[str, Kind]:
    if matrix is not None:
        matrix.check(conversion.shapes)
    return tensor_kinds(
        method,
        conversion.shapes,
        layers=conversion.layers,
        heads=conversion.heads,
        kv_heads=conversion.kv_heads,
        architecture=conversion.architecture,
        has_importance=matrix is not None,
    )


def _write(
    conversion: Conversion,
    files: Sequence[_File],
    matrix: ImportanceMatrix | None,
    deterministic: bool,
    processes: int | None,
    progress: bool,
) -> None:
    """One pass over the tensors, all files side by side; on any failure none of them is left."""
    entries = {file.method: file.entries(conversion.shapes) for file in files}
    _check_space(files[0].path.parent, sum(entry.nbytes for part in entries.values() for entry in part))
    keys = matrix.metadata() if matrix is not None else {}
    with ExitStack() as stack:
        writers = {}
        for file in files:
            metadata = file_metadata(conversion.metadata, file_type(file.method)) | keys
            writer = GgufWriter(file.path, metadata, entries[file.method])
            writers[file.method] = stack.enter_context(writer)
        bar = tqdm(
            total=sum(entry.nbytes for part in entries.values() for entry in part),
            desc=f"Writing {', '.join(file.method for file in files)}",
            unit="B",
            unit_scale=True,
            disable=None if progress else True,  # None: shown on a terminal only
            leave=False,
        )
        stack.callback(bar.close)
        pool = stack.enter_context(QuantisePool(processes))
        on_gpu = _on_gpu(deterministic)
        at_once = TENSORS_AT_ONCE if on_gpu else 1  # the pool's processes share one tensor
        # Left in reverse order: all has been stored before a file is closed.
        makers, disk = (stack.enter_context(ThreadPoolExecutor(threads)) for threads in (at_once, 1))
        pending: list[Future] = []
        for name, values in _ahead(
            conversion.read_on_device if on_gpu else conversion.read, list(conversion.shapes)
        ):
            while len(pending) > at_once:
                pending.pop(0).result()
            importance = None if matrix is None else matrix.importance(name, values.shape[-1])
            kinds = {file.kinds[name] for file in files}
            made = makers.submit(_make, name, values, kinds, importance, pool)
            pending.append(disk.submit(_store, name, made, files, writers, bar))
        for future in pending:
            future.result()


def _check_space(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < nbytes + _HEADROOM:
        raise OSError(
            f"the files need {(nbytes + _HEADROOM) / 1e9:.2f} GB in {folder} and {free / 1e9:.2f} GB are free there; "
            "nothing was written. Free some space, or choose another disk or fewer methods."
        )


def _ahead(read: Callable[[str], Weights], names: Sequence[str]) -> Iterator[tuple[str, Weights]]:
    """Every tensor in order, the next one made while the last is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(read, names[0])
        for i, name in enumerate(names):
            values = coming.result()
            if i + 1 < len(names):
                coming = pool.submit(read, names[i + 1])
            yield name, values


def _on_gpu(deterministic: bool) -> bool:
    return jax.default_backend() == "gpu" and not deterministic


def _quantise(values: Weights, kind: Kind, importance: np.ndarray | None, pool: QuantisePool) -> np.ndarray:
    """Blocks uint8 [rows, row_bytes]: of weights on a GPU the types that it can, all others on the CPU's cores."""
    if isinstance(values, jax.Array) and kind in quantisers_jax.KINDS:
        return quantisers_jax.quantise(values, kind, importance)
    return pool.quantise(np.asarray(values), kind, importance)


def _make(
    name: str, values: Weights, kinds: set[Kind], importance: np.ndarray | None, pool: QuantisePool
) -> dict[Kind, np.ndarray]:
    """A tensor in each of the types."""
    try:
        return {kind: _quantise(values, kind, importance, pool) for kind in kinds}
    except ValueError as error:  # a number too large for a type: it does not say where
        raise ValueError(f"{name}: {error}") from error


def _store(name: str, made: Future[dict[Kind, np.ndarray]], files, writers, bar: tqdm) -> None:
    blocks = made.result()
    for file in files:
        data = blocks[file.kinds[name]]
        writers[file.method].write(name, data)
        bar.update(data.nbytes)


def _report(files: Sequence[_File], conversion: Conversion, seconds: float, modelfile: Path) -> None:
    """The table of the files, and how to run them."""
    table = Table(
        title=f"{len(files)} GGUF file{'s' * (len(files) > 1)} in {seconds:.1f} s", title_justify="left"
    )
    table.add_column("file")
    table.add_column("size", justify="right")
    table.add_column("bits per weight", justify="right")
    for file in files:
        size = file.path.stat().st_size
        bits = bits_per_weight(file.kinds, conversion.shapes)
        table.add_row(file.path.name, f"{size / 1e6:,.1f} MB", f"{bits:.2f}")
    console = Console()
    console.print(table)
    print("Run it:", *ollama.commands([file.path for file in files], modelfile), sep="\n  ")
