"""One of several processes of a run, for test_processes.

python tests/processes_program.py MODEL OUT HOST:PORT NUMBER COUNT DATA FSDP HEIGHT ACTION

ACTION: "all" trains to the end; "kill" and "term" send the last process SIGKILL after step 7, SIGTERM after 6. Resumes
from the last checkpoint of OUT where there is one. OUT/weights.npy: what was trained.
"""

import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
from devices_program import flat, sft

from jaxtune.checkpoint import checkpoint_steps
from jaxtune.cluster import connect, is_first
from jaxtune.config import ClusterArguments

TIMEOUT = 10  # seconds


class Signal:
    """Sends a signal to this process after a step; then steps take long enough for the others to hear of it."""

    def __init__(self, number: signal.Signals, step: int):
        self.number, self.step = number, step

    def on_step_end(self, trainer, metrics) -> None:
        if trainer.state.global_step == self.step:
            os.kill(os.getpid(), self.number)
        if trainer.state.global_step >= self.step:
            time.sleep(3)


def main() -> None:
    folder, out, coordinator = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    number, count, data, fsdp, height = map(int, sys.argv[4:9])
    signals = {"kill": (signal.SIGKILL, 7), "term": (signal.SIGTERM, 6)}  # it is step 5 that is resumed from
    connect(ClusterArguments(coordinator, count, number, TIMEOUT))
    jax.config.update("jax_disable_most_optimizations", True)
    chosen = number == count - 1 and sys.argv[9] in signals
    trainer = sft(
        folder, out, data, fsdp, height, save_strategy="steps", save_steps=5,
        resume_from_checkpoint=bool(checkpoint_steps(out)),
        callbacks=[Signal(*signals[sys.argv[9]])] if chosen else [],
    )  # fmt: skip
    if is_first():
        np.save(out / "weights.npy", flat(trainer.model))


if __name__ == "__main__":
    main()
