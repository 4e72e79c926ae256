"""Pairs of processes of which one is killed, most of them while they save, for test_devices.

    python tests/saves_program.py OUT TIMEOUT PORT …

Of each case that MOMENTS names, in OUT/<case>: checkpoint-1 whole, and checkpoint-2 as the kill left it; in
OUT/<case>.<number>.txt what process <number> said. Prints a line of JSON: case -> of each process its exit status, and
seconds from the first's end to its own. Forks of one process, made before JAX has started: importing takes the time.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint
import test_checkpoint

from jaxtune import checkpoint, cluster
from jaxtune.config import ClusterArguments
from jaxtune.devices import ROWS, WHOLE, make_layout
from jaxtune.metrics import TrainerState

# case -> which of the two is killed
MOMENTS = {
    "in a sum over devices": 1,
    "before its arrays": 1,
    "after its arrays": 1,
    "before the rename of the arrays": 0,
    "before the rename of the whole": 0,
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_rename(path: str) -> None:
    """The process dies when it is about to rename a file of that ending."""

    def hook(name, arguments):
        if name == "os.rename" and str(arguments[0]).endswith(path):
            die()

    sys.addaudithook(hook)


def kill_around_arrays(*, before: bool, after_saves: int = 0) -> None:
    """The process dies before or after it has written its part of the arrays, after so many saves that are whole."""
    handler = orbax.checkpoint.StandardCheckpointHandler
    write, left = handler.save, after_saves

    def save(*arguments, **named):
        nonlocal left
        if left or not before:
            write(*arguments, **named)
        if not left:
            die()
        left -= 1

    handler.save = save  # pyrefly: ignore


def process(case: str, number: int, out: Path, timeout: int, port: int) -> None:
    """Process `number` of a pair."""
    os.environ["JAX_COORDINATOR_BIND_ADDRESS"] = f"127.0.0.1:{port}"
    cluster.connect(ClusterArguments(f"127.0.0.1:{port}", 2, number, timeout))
    layout = make_layout(0)
    assert cluster.smallest(78 * 10**9 + number) == 78 * 10**9  # more than 32 bits hold
    for step in (1, 2):
        if step == 2 and number == MOMENTS[case]:
            if case == "in a sum over devices":
                die()
            elif case.endswith("its arrays"):
                kill_around_arrays(before=case.startswith("before"))
            else:
                kill_at_rename(
                    "state.orbax-checkpoint-tmp" if "of the arrays" in case else "tmp-checkpoint-2"
                )
        total = layout.spread(layout.sum, ROWS, WHOLE)(layout.put(np.arange(layout.size), ROWS))
        assert np.asarray(total) == [1]
        made = jax.tree.map(lambda leaf: layout.put(np.asarray(leaf)), test_checkpoint.make_run(step))
        checkpoint.save_checkpoint(
            out / case, *made, TrainerState(global_step=step), {"seed": step}, lambda folder: None
        )


def start(case: str, number: int, out: Path, timeout: int, port: int) -> int:
    """The id of the process that does it."""
    child = os.fork()
    if child:
        return child
    log = os.open(out / f"{case}.{number}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1), os.dup2(log, 2)
    status = 1
    try:
        process(case, number, out, timeout, port)
        status = 0
    finally:
        if status:
            traceback.print_exc()
        os._exit(status)


def main() -> None:
    out, timeout, *ports = Path(sys.argv[1]), *map(int, sys.argv[2:])
    running = {
        start(case, number, out, timeout, port): (case, number)
        for case, port in zip(MOMENTS, ports, strict=True)
        for number in (0, 1)
    }
    ended: dict[str, list] = {case: [None, None] for case in MOMENTS}
    first: dict[str, float] = {}
    while running:
        child, status = os.wait()
        case, number = running.pop(child)
        first.setdefault(case, time.monotonic())
        ended[case][number] = os.waitstatus_to_exitcode(status), time.monotonic() - first[case]
    print(json.dumps(ended))


if __name__ == "__main__":
    main()
