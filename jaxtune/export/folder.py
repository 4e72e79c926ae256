"""Write an output folder so that it is never half there.

Files go to a temporary folder beside the target. A new target appears by one rename. In an existing one only
the
files of a checkpoint are replaced, after the new ones are complete: its config goes first and comes back
    last, so an
interrupted replacement is a folder that no library loads.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxtune.formats.safetensors_reader import INDEX_NAME
from jaxtune.hub import ADAPTER_CONFIG, ADAPTER_WEIGHTS

MODEL_CONFIG = "config.json"
_ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
_MODEL_FILES = (MODEL_CONFIG, INDEX_NAME, "generation_config.json", "model*.safetensors")
_HEADROOM = 50_000_000  # bytes kept free for tokenizer, configs and the file system


@contextmanager
def staged_folder(target: str | Path, nbytes: int) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it becomes (or goes into) `target`, on failure it is removed.

    Args:
        target: folder to make; files in it that belong to no checkpoint are left alone.
        nbytes: size of the weights to come.

    Raises:
        OSError: less disk space than `nbytes` is free; nothing is written.
    """
    target = Path(target).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; give the folder to save into")
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < nbytes + _HEADROOM:
        raise OSError(
            f"saving to {target} needs {(nbytes + _HEADROOM) / 1e9:.2f} GB and {free / 1e9:.2f} GB are free there; "
            "nothing was written. Free some space or choose another disk."
        )
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    staging.chmod(0o755)
    try:
        yield staging
        if target.exists():
            _replace(staging, target)
        else:
            staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(staging: Path, target: Path) -> None:
    """Put a complete new checkpoint in the place of an old one."""
    config = next(name for name in (ADAPTER_CONFIG, MODEL_CONFIG) if (staging / name).exists())
    # A merged model takes the place of an adapter too: libraries would put the old adapter on top of it.
    stale = _ADAPTER_FILES if config == ADAPTER_CONFIG else _ADAPTER_FILES + _MODEL_FILES
    for pattern in (config, *stale):
        for file in target.glob(pattern):
            file.unlink()
    for file in sorted(staging.iterdir(), key=lambda file: file.name == config):
        destination = target / file.name
        if destination.is_dir():
            shutil.rmtree(destination)
        file.replace(destination)
