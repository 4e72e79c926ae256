"""`python -m jaxtune.train`: fine-tune a model from a YAML file and the command line.

Exit status: 0 done, 1 failed while training or saving, 2 a setting, model or dataset that cannot be used (one line),
130 interrupted.
"""

import os
import sys
import warnings
from collections.abc import Sequence

from jaxtune.command_line import ConfigError, Job, parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one job; returns the exit status."""
    warnings.showwarning = _one_line
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would say that there is no PyTorch
    try:
        job = parse(sys.argv[1:] if arguments is None else arguments, Job)
    except ConfigError as error:
        return _fail(error)

    # Only now: --help and a mistyped setting should not wait for jax and transformers.
    import datasets

    from jaxtune import job as jobs
    from jaxtune.dry_run import dry_run

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        if job.dry_run:
            dry_run(job)
            return 0
        prepared = jobs.prepare(job)
    except (ValueError, TypeError, OSError) as error:  # what loading and data preparation raise on bad input
        if job.traceback:
            raise
        return _fail(error)
    try:
        jobs.train(prepared)
    except KeyboardInterrupt:  # the trainer has finished its step and saved
        print("stopped; the same command with --resume_from_checkpoint true goes on", file=sys.stderr)
        return 130
    return 0


def _fail(error: Exception) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _one_line(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
