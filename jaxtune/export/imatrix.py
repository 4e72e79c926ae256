"""The importance matrix: for each linear layer the mean square of every input column over some text.

A quantiser that knows it spends its precision on the columns that matter. It is collected here by running the model
with its adapter over rows of the user's data, and read and written in both of llama.cpp's file formats: GGUF
("in_sum2" and "counts" per tensor) and the older .dat.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from gguf.constants import GGMLQuantizationType
from tqdm.auto import tqdm

from jaxtune import models
from jaxtune.export.gguf_format import GgufWriter, TensorEntry
from jaxtune.formats.gguf_file import GgufFile
from jaxtune.formats.gguf_names import gguf_name
from jaxtune.models.layers import Linear
from jaxtune.models.names import join

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxtune.model import Model

CHUNK = 512  # tokens of a chunk, llama.cpp's default too
_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class ImportanceMatrix:
    """Sums of squares of what went into each linear layer.

    sums: GGUF tensor name -> float32 [in]. counts: GGUF tensor name -> tokens summed over.
    datasets: where the text came from. chunk_size: tokens of a chunk. file: where this was read from or written to.
    """

    sums: dict[str, np.ndarray]
    counts: dict[str, int]
    datasets: tuple[str, ...] = ()
    chunk_size: int = CHUNK
    file: str = ""

    @property
    def chunks(self) -> int:
        """Chunks of text seen."""
        return max(self.counts.values(), default=0) // self.chunk_size

    def importance(self, name: str, width: int) -> np.ndarray | None:
        """float32 [width], the mean squares of a tensor's input columns; None where nothing was collected.

        Raises:
            ValueError: it has another number of columns: the matrix is another model's.
        """
        if name not in self.sums or self.counts[name] <= 0:
            return None
        if self.sums[name].shape != (width,):
            raise ValueError(
                f"the importance matrix has {self.sums[name].size} columns for {name}, the model {width}; "
                f"it is of another model{f' ({self.file})' if self.file else ''}"
            )
        return self.sums[name] / np.float32(self.counts[name])

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raises ValueError where the matrix fits no tensor of a model, or one of another width, or holds NaN."""
        if not self.sums.keys() & shapes.keys():
            raise ValueError(
                f"the importance matrix fits no tensor of this model; it has {', '.join(sorted(self.sums)[:3])}, …"
            )
        for name in self.sums.keys() & shapes.keys():
            values = self.importance(name, shapes[name][-1])
            if values is not None and not (np.isfinite(values).all() and (values >= 0).all()):
                raise ValueError(f"the importance matrix has NaN, infinite or negative values for {name}")

    def metadata(self) -> dict[str, Any]:
        """What llama-quantize writes into a file that was quantised with a matrix."""
        keys: dict[str, Any] = {"file": self.file} if self.file else {}
        keys |= {"dataset": self.datasets[-1]} if self.datasets else {}
        keys |= {"entries_count": np.uint32(len(self.sums)), "chunks_count": np.uint32(self.chunks)}
        return {f"quantize.imatrix.{key}": value for key, value in keys.items()}

    def save(self, path: str | Path) -> None:
        """Writes llama.cpp's file: the older format for a name that ends in .dat, else GGUF."""
        path = Path(path)
        (self._save_dat if path.suffix == ".dat" else self._save_gguf)(path)

    def _save_gguf(self, path: Path) -> None:
        metadata = {
            "general.type": "imatrix",
            "imatrix.datasets": list(self.datasets),
            "imatrix.chunk_count": np.uint32(self.chunks),
            "imatrix.chunk_size": np.uint32(self.chunk_size),
        }
        tensors = {}
        for name in sorted(self.sums):
            tensors[name + _SUMS] = self.sums[name]
            tensors[name + _COUNTS] = np.array([self.counts[name]], np.float32)
        kind = GGMLQuantizationType.F32
        entries = [TensorEntry(name, value.shape, kind) for name, value in tensors.items()]
        with GgufWriter(path, metadata, entries) as writer:
            for name, value in tensors.items():
                writer.write(name, value)

    def _save_dat(self, path: Path) -> None:
        """int32 entries; per entry a string, int32 chunks, int32 width, float32 mean · chunks; chunks; the dataset."""
        text = lambda value: struct.pack("<i", len(value.encode())) + value.encode()  # noqa: E731
        parts = [struct.pack("<i", len(self.sums))]
        for name in sorted(self.sums):
            calls = -(-self.counts[name] // self.chunk_size)
            values = self.sums[name] / np.float32(self.counts[name]) * np.float32(calls)
            parts += [text(name), struct.pack("<ii", calls, values.size), values.astype("<f4").tobytes()]
        parts += [struct.pack("<i", self.chunks), text(self.datasets[-1] if self.datasets else "")]
        path.write_bytes(b"".join(parts))


def read_imatrix(path: str | Path) -> ImportanceMatrix:
    """Reads a file of llama-imatrix, of either format.

    Raises:
        ValueError: it is no such file, is cut off, or holds several matrices a tensor (mixtures of experts).
    """
    path = Path(path)
    with path.open("rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    if not is_gguf:
        return _read_dat(path)
    file = GgufFile(path)
    if file.metadata.get("general.type") != "imatrix":
        raise ValueError(
            f"{path} is a GGUF file of type {file.metadata.get('general.type')!r}, not 'imatrix'"
        )
    sums, counts = {}, {}
    for name in file.tensors:
        if not name.endswith(_SUMS):
            continue
        tensor = name.removesuffix(_SUMS)
        count = file.read(tensor + _COUNTS) if tensor + _COUNTS in file.tensors else np.empty(0)
        if count.size != 1:
            raise ValueError(f"{path}: {tensor} has {count.size} counts; jaxtune knows one matrix a tensor")
        sums[tensor], counts[tensor] = np.array(file.read(name)).reshape(-1), round(float(count.ravel()[0]))
    datasets = tuple(file.metadata.get("imatrix.datasets", ()))
    return ImportanceMatrix(sums, counts, datasets, file.metadata.get("imatrix.chunk_size", CHUNK), str(path))


def _read_dat(path: Path) -> ImportanceMatrix:
    data, at = path.read_bytes(), 0

    def take(count: int) -> bytes:
        nonlocal at
        if count < 0 or at + count > len(data):
            raise ValueError(f"{path} is no importance matrix of llama.cpp, or is cut off at byte {at:,}")
        at += count
        return data[at - count : at]

    def number() -> int:
        return struct.unpack("<i", take(4))[0]

    sums, counts = {}, {}
    for _ in range(number()):
        name = take(number()).decode("utf-8", "replace")
        calls, width = number(), number()
        values = np.frombuffer(take(4 * width), "<f4")
        # The file does not say how many tokens a call had: as in llama.cpp, CHUNK.
        sums[name], counts[name] = values * np.float32(CHUNK), max(calls, 1) * CHUNK
    if not sums:
        raise ValueError(f"{path} is no importance matrix of llama.cpp: it has no entry")
    if at + 4 <= len(data):  # old files end here
        number()
    dataset = take(number()).decode("utf-8", "replace") if at + 4 <= len(data) else ""
    return ImportanceMatrix(sums, counts, (dataset,) if dataset else (), file=str(path))


def load_or_collect(
    given: Any, model: Model, tokenizer: PreTrainedTokenizerBase | None = None, *, progress: bool = True
) -> ImportanceMatrix:
    """A matrix as it is, one of a file of llama.cpp's, or one collected from rows of text.

    Args:
        given: an `ImportanceMatrix`; a path, which is a matrix unless it ends as a dataset's does, is a folder or does
            not exist; or rows, as for `collect_imatrix`.
    """
    from jaxtune.data.sources import FILE_BUILDERS

    if isinstance(given, ImportanceMatrix):
        return given
    if isinstance(given, bool):
        raise ValueError(
            f"imatrix={given}: pass rows to collect a matrix from, or a file of one; nothing is downloaded"
        )
    if isinstance(given, (str, Path)):
        path = Path(given).expanduser()
        if path.suffix in (".gguf", ".dat") or (path.is_file() and path.suffix not in FILE_BUILDERS):
            return read_imatrix(path)
    return collect_imatrix(model, given, tokenizer, progress=progress)


def collect_imatrix(
    model: Model,
    rows: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_chunks: int = 200,
    chunk_size: int = CHUNK,
    batch_size: int = 4,
    dataset_text_field: str = "text",
    progress: bool = True,
) -> ImportanceMatrix:
    """Runs the model, adapter included, over rows of text and sums the squares of every linear layer's inputs.

    Args:
        model: loaded, trained or not.
        rows: what `SFTTrainer` takes as a dataset, or a list of strings. A few hundred rows of what the model will
            be used for are enough.
        tokenizer: the model's by default; its chat template makes text of conversations.
        max_chunks: stop after so many chunks.
        chunk_size: tokens of a chunk. Rows are packed into chunks and do not see each other there; a row longer than
            a chunk is split.
        batch_size: chunks of one forward pass.
        dataset_text_field: column of a plain text.
        progress: show a progress bar.

    Returns:
        A matrix for every linear layer but the head, as llama-imatrix collects by default.

    Raises:
        ValueError: no usable rows, or an activation that is NaN or infinite (its tensor is named).
    """
    from jaxtune.data.batches import Batches  # here because it brings transformers, and that torch
    from jaxtune.data.responses import chat_tokenizer

    packed = _packed(rows, chat_tokenizer(tokenizer or model.tokenizer), chunk_size, dataset_text_field)
    packed = packed.select(range(min(max_chunks, len(packed))))
    batches = Batches(
        packed, batch_size=min(batch_size, len(packed)), max_length=chunk_size, packed=True, shuffle=False
    )
    totals: dict[str, np.ndarray] = {}
    tokens = 0
    hidden = None if progress else True  # None: shown on a terminal only
    bar = tqdm(total=len(packed), desc="Importance matrix", unit="chunk", disable=hidden, leave=False)
    for batch in batches.eval_batches():
        ids = {name: batch[name] for name in ("input_ids", "positions", "segment_ids")}
        for name, value in _named(model, _sums(model.graphdef, model.trainable, model.base, ids)):
            totals[name] = totals.get(name, 0) + value.astype(np.float64)
        tokens += int((batch["segment_ids"] != 0).sum())
        bar.update(min(batches.batch_size, bar.total - bar.n))
    bar.close()
    for name, value in totals.items():
        if not np.isfinite(value).all():
            raise ValueError(f"what goes into {name} is NaN or infinite; the training diverged")
    sums = {name: value.astype(np.float32) for name, value in totals.items()}
    source = str(rows) if isinstance(rows, (str, Path)) else "rows"
    return ImportanceMatrix(sums, dict.fromkeys(totals, tokens), (source,), chunk_size)


def _packed(rows: Any, tokenizer: PreTrainedTokenizerBase, chunk_size: int, text_field: str):
    """Rows of any known format as chunks: columns input_ids, labels, seq_lengths."""
    from jaxtune.config import SFTConfig
    from jaxtune.data.packing import pack
    from jaxtune.data.prepare import prepare_dataset

    if isinstance(rows, Sequence) and not isinstance(rows, str) and rows and isinstance(rows[0], str):
        rows, text_field = [{"text": row} for row in rows], "text"
    args = SFTConfig(
        max_length=chunk_size, packing=True, packing_strategy="bfd_split", dataset_text_field=text_field
    )
    return pack(prepare_dataset(rows, tokenizer, args), chunk_size, "bfd_split")


class _Watched:
    """Stands in a layer in the place of one of its linear layers and notes what goes in."""

    bias = None  # the real layer adds its own

    def __init__(self, linear: Linear, note: Callable[[jax.Array], None]):
        self._linear, self._note = linear, note
        self.out_features = linear.out_features

    def is_plain(self, key: jax.Array | None) -> bool:
        """Never: it is to be asked by itself, not in one product with others."""
        return False

    def apply_alone(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """The real layer's output."""
        self._note(x)
        return self._linear(x, key)

    __call__ = apply_alone


def _watch(layer: nnx.Module, real: jax.Array) -> dict[str, jax.Array]:
    """Has a layer note Σ x² [in] over the `real` [B, T] tokens, under each of its linear layers' names, as it runs."""
    seen: dict[str, jax.Array] = {}

    def note(name: str, x: jax.Array) -> None:
        seen[name] = jnp.sum(jnp.square(x.astype(jnp.float32)) * real[..., None], (0, 1))

    linears = [(path, module) for path, module in nnx.iter_modules(layer) if isinstance(module, Linear)]
    for path, module in linears:
        parent = layer
        for part in path[:-1]:
            parent = getattr(parent, str(part))
        setattr(parent, str(path[-1]), _Watched(module, partial(note, ".".join(map(str, path)))))
    return seen


@partial(jax.jit, static_argnames="graphdef")
def _sums(graphdef, trainable, base, batch: dict[str, jax.Array]) -> list[list[dict[str, jax.Array]]]:
    """Per segment and layer of its period: name of a linear layer -> Σ x², float32 [repeats, in].

    The layers run as in `CausalLM.hidden`, one scan a segment; the sums are what the scans hand out.
    """
    module = join(graphdef, trainable, base)
    x = module.embed(batch["input_ids"])
    ctx = module.context(batch["positions"], batch["segment_ids"])
    real = batch["segment_ids"] != 0

    def run(graph, x, state):
        seen = []
        for layer in nnx.merge(graph, state):
            seen.append(_watch(layer, real))
            x, _ = layer(x, ctx)
        return x, seen

    sums = []
    for segment in module.decoder.layers:
        graph, state = nnx.split(segment)
        x, seen = jax.lax.scan(partial(run, graph), x, state)
        sums.append(seen)
    return sums


def _named(model: Model, sums: list[list[dict[str, jax.Array]]]) -> Iterator[tuple[str, np.ndarray]]:
    """(GGUF tensor name, float32 [in]) of everything that `_sums` gave."""
    architecture = models.family(model.config).GGUF.architecture
    for segment, periods in zip(model.module.plan, sums, strict=True):
        for at, layer in enumerate(periods):
            for path, stacked in layer.items():
                for repeat, value in enumerate(np.asarray(stacked)):
                    number = segment.first + repeat * segment.period + at
                    yield gguf_name(f"model.layers.{number}.{path}.weight", architecture), value
