"""Running a training program: messages in one line, exit statuses, and nothing slow before the settings are read.

Exit status: 0 done, 1 failed while training or saving, 2 a setting, model or dataset that cannot be used (one line),
130 interrupted.
"""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from jaxtune.command_line import BaseJob, ConfigError, parse

Prepare = Callable[[Any], Callable[[], None] | None]  # job -> what trains it; None: nothing is left to do


def run(arguments: Sequence[str], kind: type[BaseJob], load: Callable[[], Prepare]) -> int:
    """Run one job; returns the exit status.

    Args:
        arguments: without the program's name.
        kind: of job.
        load: imports what the job needs, and returns what loads its model and data.
    """
    warnings.showwarning = _one_line
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would say that there is no PyTorch
    try:
        job = parse(arguments, kind)
    except ConfigError as error:
        return _fail(error)

    # Only now: --help and a mistyped setting should not wait for jax and transformers.
    import datasets

    from jaxtune import gpu_memory
    from jaxtune.cluster import connect

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    gpu_memory.claim(job.share_beside_jax)
    try:
        connect(job.cluster)
        train = load()(job)
    except (ValueError, TypeError, OSError) as error:  # what loading and data preparation raise on bad input
        if job.traceback:
            raise
        return _fail(error)
    try:
        if train is not None:
            train()
    except KeyboardInterrupt:  # the trainer has finished its step and saved
        print("stopped; the same command with --resume_from_checkpoint true goes on", file=sys.stderr)
        return 130
    except MemoryError as error:  # remat="auto" says what would fit
        if job.traceback:
            raise
        return _fail(error)
    return 0


def _fail(error: Exception) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _one_line(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"warning: {message}", file=sys.stderr)
