"""Checkpoints of a run: output_dir/checkpoint-N, whole or not there.

    checkpoint-N/
      state/               Orbax: the trained leaves and the optimizer's state
      trainer_state.json   step, log history, what the run depended on (its fingerprint)
      adapter_model.safetensors, adapter_config.json, tokenizer files: a PEFT folder (or the whole model)

A checkpoint is written under the name tmp-checkpoint-N, forced to the disk, and renamed as the last act,
so whatever is named checkpoint-N is whole. What a killed process leaves behind is ignored and removed by
the next run. The processes of a run write into one folder, which all must see: each its arrays, the first the rest
and the names. Randomness and the order of the data are functions of (seed, step): the step is all there is
to keep of them.
"""

import dataclasses
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jaxtune import cluster
from jaxtune.config import TrainingConfig
from jaxtune.devices import whole_like
from jaxtune.metrics import TrainerState

LORA_SETTINGS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
STATE_FILE = "trainer_state.json"
ARRAYS = "state"
_TEMPORARY = "tmp-checkpoint-"
_NAME = re.compile(r"checkpoint-(\d+)")

PyTree = Any


class Trained(Protocol):
    """What a fingerprint needs of a model."""

    trainable: dict[str, jax.Array]
    base: dict[str, jax.Array]
    lora: Any
    dtype: Any
    compute_dtype: str | None


def save_checkpoint(
    output_dir: str | Path,
    trainable: Mapping[str, jax.Array],
    opt_state: PyTree,
    state: TrainerState,
    run: Mapping[str, Any],
    write_model: Callable[[Path], None],
) -> Path:
    """Write output_dir/checkpoint-<state.global_step>, in place of a folder of that name from an earlier run.

    Args:
        trainable, opt_state: kept bit for bit.
        state: where the run stands.
        run: its fingerprint.
        write_model: writes the files that other libraries load into the folder that it is given.

    Raises:
        OSError or ValueError (from Orbax): not written, for instance on a full disk; those before it are intact.
    """
    output_dir = Path(output_dir).absolute()
    folder = output_dir / f"checkpoint-{state.global_step}"
    if not cluster.is_first():
        cluster.wait_for_all("checkpoint begun")
        _save_arrays(_temporary(folder), trainable, opt_state)
        cluster.wait_for_all("checkpoint there")
        return folder
    with _written_whole(folder) as temporary:
        cluster.wait_for_all("checkpoint begun")
        _save_arrays(temporary, trainable, opt_state)
        write_model(temporary)
        text = json.dumps({**dataclasses.asdict(state), "fingerprint": run}, indent=1)
        (temporary / STATE_FILE).write_text(text, encoding="utf-8")
    cluster.wait_for_all("checkpoint there")
    return folder


def _save_arrays(folder: Path, trainable: Mapping[str, jax.Array], opt_state: PyTree) -> None:
    with _orbax() as checkpointer:
        checkpointer.save(folder / ARRAYS, _arrays(trainable, opt_state))


def load_checkpoint(
    folder: str | Path, trainable: Mapping[str, jax.Array], opt_state: PyTree
) -> tuple[dict[str, jax.Array], PyTree]:
    """Read the arrays of a checkpoint bit for bit, onto the devices of the given ones (same shapes)."""
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        _arrays(trainable, opt_state),
    )
    with _orbax() as checkpointer:
        saved = checkpointer.restore(Path(folder).absolute() / ARRAYS, like)
    leaves = [saved["opt_state"][name] for name in _named_leaves(opt_state)]  # a restored dict is sorted
    return saved["trainable"], jax.tree.unflatten(jax.tree.structure(opt_state), leaves)


def read_state(folder: str | Path) -> tuple[TrainerState, dict[str, Any]]:
    """Where the run of a checkpoint stood, and its fingerprint."""
    path = Path(folder) / STATE_FILE
    if not path.is_file() or not (Path(folder) / ARRAYS).is_dir():
        raise ValueError(
            f"{folder} is not a checkpoint of jaxtune: it needs {STATE_FILE} and a folder {ARRAYS}. To "
            "go on from another library's adapter, load that folder with FastLanguageModel.from_pretrained."
        )
    values = json.loads(path.read_text(encoding="utf-8"))
    run = values.pop("fingerprint")
    return TrainerState(**values), run


def find_checkpoint(resume: str | Path | bool | None, output_dir: str | Path) -> Path | None:
    """The folder that train(resume_from_checkpoint=resume) means: None, a path, or for True the newest."""
    if resume is None or resume is False:
        return None
    if resume is not True:
        folder = Path(resume)
        if not folder.is_dir():
            raise FileNotFoundError(f"resume_from_checkpoint: there is no folder {folder}")
        return folder
    steps = checkpoint_steps(output_dir)
    if not steps:
        raise FileNotFoundError(
            f"resume_from_checkpoint=True: {output_dir} holds no checkpoint-N folder; leave the argument "
            "out to start from the beginning"
        )
    return Path(output_dir) / f"checkpoint-{steps[-1]}"


def checkpoint_steps(output_dir: str | Path) -> list[int]:
    """Steps of the checkpoints in a folder, ascending."""
    if not Path(output_dir).is_dir():
        return []
    matches = (_NAME.fullmatch(entry.name) for entry in Path(output_dir).iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def remove_checkpoints(output_dir: str | Path, steps: Iterable[int]) -> None:
    """Delete these checkpoints, each renamed first so that none is ever half there."""
    for step in steps:
        doomed = Path(output_dir) / f"{_TEMPORARY}{step}-old"
        os.rename(Path(output_dir) / f"checkpoint-{step}", doomed)
        shutil.rmtree(doomed)


def remove_leftovers(output_dir: str | Path) -> None:
    """Delete what a killed process left half written."""
    for leftover in Path(output_dir).glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover)


def fingerprint(
    args: TrainingConfig, num_steps: int, model: Trained, data: Mapping[str, Any]
) -> dict[str, Any]:
    """What the result of a run depends on, as JSON values: settings, shapes, checksum of the base, and `data`."""
    settings = {n: value for n, value in dataclasses.asdict(args).items() if n not in args.FREE_SETTINGS}
    settings["warmup_steps"] = args.num_warmup_steps(num_steps)
    if not args.lr_scheduler_type.startswith("constant"):
        settings["steps of the schedule"] = num_steps
    run = {
        **settings,
        "dtype": str(np.dtype(model.dtype)),
        "compute_dtype": model.compute_dtype,
        **{name: getattr(model.lora, name, None) for name in LORA_SETTINGS},
        "trained weights": {
            name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in model.trainable.items()
        },
        "frozen weights (checksum of a sample)": leaves_checksum(model.base),
        **data,
    }
    return json.loads(json.dumps(run))  # tuples become lists, as they come back from a file


def check_fingerprint(saved: Mapping[str, Any], now: Mapping[str, Any], folder: str | Path) -> None:
    """Raise if a run described by `now` would not go on as the one that wrote the checkpoint."""
    names = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    if names:
        lines = [f"  {name}: {saved.get(name)!r} in the checkpoint, {now.get(name)!r} now" for name in names]
        raise ValueError(
            f"{folder} was written by a run that differs in what decides the result:\n"
            + "\n".join(lines)
            + "\n"
            "Use the same settings and data, or start a new run from these weights: load the folder with "
            "FastLanguageModel.from_pretrained and leave resume_from_checkpoint out."
        )


def leaves_checksum(leaves: Mapping[str, jax.Array]) -> int:
    """CRC-32 of up to 256 numbers of each leaf; one small computation, however large they are."""

    def sample(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {
            name: leaf[(0,) * (leaf.ndim - 1)][:256] if leaf.ndim else leaf for name, leaf in leaves.items()
        }

    value = 0
    whole = whole_like(leaves.values())
    for _, array in sorted(jax.device_get(jax.jit(sample, out_shardings=whole)(dict(leaves))).items()):
        value = zlib.crc32(np.ascontiguousarray(array).tobytes(), value)
    return value


def _temporary(folder: Path) -> Path:
    return folder.with_name(f"{_TEMPORARY}{folder.name.removeprefix('checkpoint-')}")


@contextmanager
def _written_whole(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside `folder`; on success make it durable and put it in its place."""
    temporary = _temporary(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent)
    temporary.mkdir()
    try:
        yield temporary
        for root, _, files in os.walk(temporary):
            for name in [*files, "."]:
                _to_disk(os.path.join(root, name))
        replaced = temporary.with_name(f"{temporary.name}-old")
        if folder.exists():
            os.rename(folder, replaced)
        os.rename(temporary, folder)
        _to_disk(folder.parent)
        if replaced.exists():
            shutil.rmtree(replaced)
    except Exception as error:
        steps = checkpoint_steps(folder.parent)
        last = f"the last whole one is checkpoint-{steps[-1]}" if steps else "there is none before it"
        error.add_note(f"{folder} was not written; {last}.")
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _to_disk(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _arrays(trainable: Mapping[str, jax.Array], opt_state: PyTree) -> dict[str, dict[str, jax.Array]]:
    return {"trainable": dict(trainable), "opt_state": _named_leaves(opt_state)}


def _named_leaves(tree: PyTree) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _orbax():
    """Orbax's checkpointer; imported here because it takes half a second and only runs that save need it."""
    import orbax.checkpoint

    return orbax.checkpoint.Checkpointer(orbax.checkpoint.StandardCheckpointHandler())
