"""`python -m jaxtune.rl.train`: GRPO from a YAML file and the command line. Exit status: see `jaxtune.program`."""

import sys
from collections.abc import Callable, Sequence

from jaxtune.program import Prepare, run
from jaxtune.rl.command_line import GRPOJob


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one job; returns the exit status."""
    return run(sys.argv[1:] if arguments is None else arguments, GRPOJob, _load)


def _load() -> Prepare:
    from jaxtune.rl import job as jobs

    def prepare(job: GRPOJob) -> Callable[[], None]:
        prepared = jobs.prepare(job)
        return lambda: jobs.train(prepared)

    return prepare


if __name__ == "__main__":
    sys.exit(main())
