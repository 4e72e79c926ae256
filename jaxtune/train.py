"""`python -m jaxtune.train`: fine-tune a model from a YAML file and the command line. Exit status: see `program`."""

import sys
from collections.abc import Callable, Sequence

from jaxtune.command_line import Job
from jaxtune.program import Prepare, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one job; returns the exit status."""
    return run(sys.argv[1:] if arguments is None else arguments, Job, _load)


def _load() -> Prepare:
    from jaxtune import job as jobs
    from jaxtune.dry_run import dry_run

    def prepare(job: Job) -> Callable[[], None] | None:
        if job.dry_run:
            return dry_run(job)
        prepared = jobs.prepare(job)
        return lambda: jobs.train(prepared)

    return prepare


if __name__ == "__main__":
    sys.exit(main())
