"""`remat="auto"`: the fastest choice of what to keep whose compiled step fits the memory.

A compiled step says what it needs. One compilation is usually enough: the bytes that another choice would keep are
known from shapes, so its need follows from the first's. What was needed is kept in the user's cache folder, and says
next time which choice to compile first.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from tqdm.auto import tqdm

from jaxtune import cluster, host_memory
from jaxtune.compile_cache import cache_folder
from jaxtune.devices import ONE_DEVICE, Layout, device_bytes
from jaxtune.models.decoder import DecoderConfig
from jaxtune.models.remat import NEVER_OFFLOADED, Remat

# Fastest first, for copies that the products hide (`hides_copies`).
CHOICES = tuple(
    map(
        Remat.parse,
        (
            "none",
            "none+offload",
            "attention+qkv+gate_up",
            "attention+gate_up",
            "attention+qkv+residual+offload",
            "attention+qkv",
            "attention",
            "attention+offload",
            "all",
            "all+offload",
        ),
    )
)
LEAST = CHOICES[-1]
# What a Hopper GPU computes in 16 bits while a byte goes to the host: 690 TFLOP/s of products beside 55 GB/s.
OPERATIONS_PER_BYTE = 12_000
HEADROOM = 0.96  # of free memory: cuDNN's workspaces and fragmentation are in no forecast
SAME = 0.02  # what two compilations of one program may differ by in what they need


class Choice(NamedTuple):
    """What was chosen, its step compiled, the bytes that each choice needs, and those that it puts on the host."""

    remat: Remat
    compiled: Any
    needs: dict[str, int]
    budget: int
    away: int

    def __str__(self) -> str:
        """One line: what was taken and what its neighbours would cost."""
        names = list(self.needs)
        at = names.index(str(self.remat))
        line = f"remat={self.remat}: {_gb(self.needs[names[at]])} of {_gb(self.budget)}"
        if self.away:
            line += f", {_gb(self.away)} in host memory"
        others = [
            f"{names[i]} about {_gb(self.needs[names[i]])}" for i in (at - 1, at + 1) if 0 <= i < len(names)
        ]
        return line + (f" (others: {', '.join(others)})" if others else "")


def _gb(count: int) -> str:
    return f"{count / 1e9:.{1 if count >= 1e10 else 2}f} GB"


def kept_bytes(remat: Remat, config: DecoderConfig, tokens: int, itemsize: int) -> tuple[int, int]:
    """Bytes that a choice keeps for the backward pass, layer inputs included: (on the device, on the host). What waits
    on the host is on the device for two layers at a time."""
    heads, kv, h = config.num_heads, config.num_kv_heads, config.head_dim
    elements = {
        "attention": heads * h + heads * 4 // itemsize,  # its softmax statistics are float32
        "qkv": (heads + 2 * kv) * h,
        "residual": config.hidden_size,
        "gate_up": 2 * config.intermediate_size,
    }
    size, layers = tokens * itemsize, len(config.windows)
    away = config.hidden_size + sum(elements[name] for name in remat.keep - NEVER_OFFLOADED)
    stays = sum(elements[name] for name in remat.keep & NEVER_OFFLOADED)
    if not remat.offload:
        return size * layers * (stays + away), 0
    return size * (layers * stays + 2 * away), size * layers * away


def hides_copies(remat: Remat, config: DecoderConfig, length: int, itemsize: int, fp8: bool) -> bool:
    """Whether a layer's forward pass over rows of `length` tokens takes as long as sending away what it keeps."""
    heads, h, d = config.num_heads, config.head_dim, config.hidden_size
    weights = 2 * d * (heads + config.num_kv_heads) * h + 3 * d * config.intermediate_size
    operations = 2 * weights + 2 * length * heads * h
    _, away = kept_bytes(remat, config, 1, itemsize)
    return operations / (2 if fp8 else 1) >= OPERATIONS_PER_BYTE * away / len(config.windows)


def peak_bytes(compiled) -> int:
    """Device memory of a compiled program: arguments, temporaries, and outputs that reuse no argument."""
    needs = compiled.memory_analysis()
    fresh = needs.output_size_in_bytes - needs.alias_size_in_bytes
    return needs.argument_size_in_bytes + needs.temp_size_in_bytes + fresh


def free_on_host(before: Sequence[int] = ()) -> int:
    """Bytes of this host's memory that a step may take for each device: half of what is free, and what XLA's pool of
    page-locked memory may still hold.

    before: bytes that earlier programs of this process put there for each device, each more than the one before it. The
    pool has room again for the largest; for more it adds a region, of up to twice the bytes, and never gives one back.
    """
    devices = jax.local_device_count()
    pool = int(os.environ.get("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", 64)) << 30
    left = min(host_memory.available() // 2, pool - 2 * devices * sum(before))
    return max(left // devices, *before, 0)


def free_bytes(arguments: Any) -> int:
    """Memory of this process's first device that a step may fill, its arguments (which are there already) included."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return int(HEADROOM * (host_memory.available() + _size(arguments)))
    others = max(stats["bytes_in_use"] - _size(arguments), 0)
    return int(HEADROOM * (stats["bytes_limit"] - others))


def check_evaluation(compiled: Any, arguments: Any, beside: Any, budget_gb: float | None) -> None:
    """Says before the first step that an evaluation in the middle of training would need too much memory.

    Args:
      compiled, arguments: the evaluation; the batch is the last of its arguments.
      beside: what training keeps on the device besides them.
      budget_gb: as of PlannedStep.

    Raises:
      MemoryError: it needs more than a budget that was asked for. Without one, more than is free is a warning.
    """
    free = cluster.smallest(free_bytes(arguments))
    asked = free if budget_gb is None else int(budget_gb * 1e9) - _size(beside)
    if (needs := peak_bytes(compiled)) <= min(asked, free):
        return
    rows, length = arguments[-1]["input_ids"].shape
    room = f"{_gb(free)} are free"
    if asked < free:
        room = f"memory_budget_gb={budget_gb:g} leaves {_gb(asked)} beside the optimizer's state"
    message = (
        f"an evaluation batch of {rows} x {length} tokens needs {_gb(needs)} and {room}. "
        "Make per_device_eval_batch_size smaller"
    )
    if budget_gb is not None:
        raise MemoryError(message)
    if cluster.is_first():
        warnings.warn(message, stacklevel=2)


class PlannedStep:
    """A training step that is compiled once for each shape of batch, keeping for the backward pass what fits.

    Call it as the step itself.

    Args:
      make_step: Remat -> the jitted step.
      model: gives its config and the dtype of activations.
      remat: "auto" or what Remat.parse takes.
      budget_gb: memory of each device to stay under, in GB; None, or more than is free: what is free.
      announce: gets one line for each shape that "auto" decides about.
      layout: of the arguments.
    """

    def __init__(
        self,
        make_step: Callable[[Remat], Any],
        model: Any,
        remat: str = "auto",
        budget_gb: float | None = None,
        announce: Callable[[str], None] = tqdm.write,
        layout: Layout = ONE_DEVICE,
    ):
        self._make_step, self._config = make_step, model.module.config
        self._fp8 = model.module.fp8
        self._itemsize = jnp.dtype(model.dtype).itemsize
        self._fixed = None if remat == "auto" else Remat.parse(remat)
        self._budget_gb, self._announce = budget_gb, announce
        self._compiled: dict[tuple, Any] = {}
        self._layout = layout
        self._on_host: list[int] = []  # see free_on_host

    def __call__(self, trainable, opt_state, base, batch, key):
        arguments = (trainable, opt_state, base, batch, key)
        return self.prepare(arguments)(*arguments)

    def prepare(self, arguments: tuple) -> Any:
        """The step for arguments of these shapes, compiled where it was not."""
        arrays, structure = jax.tree.flatten(arguments[3])
        shapes = structure, *(array.shape for array in arrays)
        if shapes not in self._compiled:
            self._compiled[shapes] = self.compile(arguments)
        return self._compiled[shapes]

    @property
    def compilations(self) -> int:
        """Shapes of batch that came."""
        return len(self._compiled)

    def compile(self, arguments: tuple):
        """The compiled step for arguments of these shapes."""
        if self._fixed is not None:
            return self._lowered(self._fixed, arguments)
        free = cluster.smallest(free_bytes(arguments))
        asked = None if self._budget_gb is None else int(self._budget_gb * 1e9)
        choice = choose(
            lambda remat: self._lowered(remat, arguments),
            self._config,
            arguments,
            itemsize=self._itemsize,
            budget=free if asked is None else min(asked, free),
            host=cluster.smallest(free_on_host(self._on_host)) if jax.default_backend() == "gpu" else 0,
            fp8=self._fp8,
            devices=self._layout.size,
            asked=asked is not None and asked <= free,
        )
        if choice.away > max(self._on_host, default=0):
            self._on_host.append(choice.away)
        _, rows, length = arguments[3]["input_ids"].shape
        on_each = f" on each of {self._layout.size} devices" if self._layout.size > 1 else ""
        more = (
            ""
            if asked is None or asked <= free
            else f"; memory_budget_gb={self._budget_gb:g} is more than is free"
        )
        if cluster.is_first():
            self._announce(f"{rows // self._layout.size} x {length} tokens{on_each}: {choice}{more}")
        return choice.compiled

    def _lowered(self, remat: Remat, arguments: tuple):
        return self._make_step(remat).lower(*arguments).compile()


def choose(
    compile_step: Callable[[Remat], Any],
    config: DecoderConfig,
    arguments: tuple,
    *,
    itemsize: int,
    budget: int,
    host: int,
    fp8: bool = False,
    devices: int = 1,
    asked: bool = False,
) -> Choice:
    """The first of CHOICES whose compiled step needs at most `budget` bytes.

    Args:
      compile_step: remat -> the compiled step for `arguments`.
      config: the model's.
      arguments: of the step, arrays or shapes; their shapes are what is remembered.
      itemsize: bytes of an activation.
      budget: bytes.
      host: bytes that may be put into host memory for each device, where that is another one.
      fp8: whether the step multiplies in 8-bit floats, which its arguments do not tell.
      devices: over which the rows of the batch are split; bytes are those of one.
      asked: whether `budget` is the memory_budget_gb that was asked for, not what is free; for the error.

    Raises:
      MemoryError: none fits; says what the smallest needs.
    """
    _, rows, length = arguments[3]["input_ids"].shape
    kept = partial(kept_bytes, config=config, tokens=rows // devices * length, itemsize=itemsize)
    hidden = partial(hides_copies, config=config, length=length, itemsize=itemsize, fp8=fp8)
    if "images" in arguments[3]:  # the layers of their tower are too narrow to hide copies
        hidden = lambda _: False  # noqa: E731
    choices = _candidates(kept, hidden, host)
    keeps = {remat: kept(remat)[0] for remat in choices}
    place, base = _place(arguments, fp8), _size(arguments)
    memory = _remembered(place)
    remembered = {remat: memory[str(remat)] for remat in choices if str(remat) in memory}
    found, measured = _first_that_fits(cache(compile_step), choices, remembered, keeps, base, budget)
    _remember(place, {str(remat): bytes_ for remat, bytes_ in measured.items()})
    if found is not None:
        remat, compiled = found
        needs = {str(r): _forecast(r, measured, keeps, base) for r in choices}
        return Choice(remat, compiled, needs, budget, kept(remat)[1])
    least = min(_forecast(remat, measured, keeps, base) for remat in choices)
    less = ""
    if 0 < host < (away := kept(LEAST)[1]):
        less = f" (less with {away / 1e9:.2f} GB in host memory, of which {host / 1e9:.2f} GB are to be had)"
    room = f"memory_budget_gb is {budget / 1e9:.2f}" if asked else f"{budget / 1e9:.2f} GB are free"
    more = "Raise memory_budget_gb, make " if asked else "Make "
    raise MemoryError(
        f"the training step needs at least {least / 1e9:.2f} GB{less} and {room}. {more}"
        "per_device_train_batch_size or max_length (GRPO: max_completion_length) smaller (gradient_accumulation_steps "
        "makes up for the first), use optim='adamw_8bit', or load the model in 4 bits"
    )


def _first_that_fits(
    compile_step: Callable[[Remat], Any],
    choices: Sequence[Remat],
    remembered: Mapping[Remat, int],
    keeps: Mapping[Remat, int],
    base: int,
    budget: int,
) -> tuple[tuple[Remat, Any] | None, dict[Remat, int]]:
    """The choice with its compiled step, or None, and what the choices that were compiled need.

    What is remembered may be of another program, with arguments of the same shapes: it is measured anew, and where that
    shows, forgotten.
    """
    measured = dict(remembered)
    for remat in choices:
        known = measured.get(remat)
        if (known is not None or remat != choices[-1]) and _forecast(remat, measured, keeps, base) > budget:
            continue
        compiled = compile_step(remat)
        measured[remat] = peak_bytes(compiled)
        if known is not None and abs(measured[remat] - known) > SAME * known:
            now = {remat: measured[remat]}
            return _first_that_fits(compile_step, choices, now, keeps, base, budget)
        if measured[remat] <= budget:
            return (remat, compiled), measured
    return None, measured


def _candidates(
    kept: Callable[[Remat], tuple[int, int]], hidden: Callable[[Remat], bool], host: int
) -> list[Remat]:
    """CHOICES for which the host has room, without those that a faster one makes needless. Copies that nothing hides
    are for when nothing else is left."""
    choices = []
    for remat in CHOICES:
        away = kept(remat)[1]
        allowed = not away or (away <= host and (remat == LEAST or hidden(remat)))
        if allowed and (not choices or kept(remat) < kept(choices[-1])):
            choices.append(remat)
    return choices


def _forecast(remat: Remat, measured: Mapping[Remat, int], keeps: Mapping[Remat, int], base: int) -> int:
    """Bytes that a choice needs: measured, or the nearest measured one with other bytes kept."""
    if remat in measured:
        return measured[remat]
    if not measured:
        return base + keeps[remat]
    nearest = min(measured, key=lambda known: abs(keeps[known] - keeps[remat]))
    return measured[nearest] - keeps[nearest] + keeps[remat]


def _size(tree: Any) -> int:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
    return sum(map(device_bytes, leaves))


@cache
def _sources() -> str:
    """A digest of jaxtune's own code and settings of XLA: what a step needs changes with them."""
    folder, digest = Path(__file__).parent, hashlib.sha256(os.environ.get("XLA_FLAGS", "").encode())
    for file in sorted([*folder.rglob("*.py"), *folder.rglob("*.pbtxt")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _place(arguments: tuple, fp8: bool) -> Path | None:
    """The file that remembers what these shapes need on this device with these versions. None on several hosts: they
    compile together, so none may remember what another does not."""
    folder = cache_folder()
    if folder is None or cluster.part()[1] > 1:
        return None
    shapes = [(jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype), _split(leaf)) for path, leaf in
              jax.tree_util.tree_leaves_with_path(arguments)]  # fmt: skip
    key = repr((shapes, fp8, _sources(), jax.__version__, jax.devices()[0].device_kind))
    return folder / "memory" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def _split(leaf: Any) -> str:
    """How an array lies on several devices."""
    sharding = getattr(leaf, "sharding", None)
    return "" if sharding is None or len(sharding.device_set) == 1 else str(sharding)


def _remembered(place: Path | None) -> dict[str, int]:
    try:
        return {} if place is None else json.loads(place.read_text())
    except (OSError, ValueError):
        return {}


def _remember(place: Path | None, needs: dict[str, int]) -> None:
    if place is None:
        return
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(needs))
        part.replace(place)
    except OSError:  # a read-only home costs a compilation next time, nothing else
        pass
