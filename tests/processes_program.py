"""One of several processes of a run, for test_devices.

python tests/processes_program.py MODEL OUT HOST:PORT NUMBER COUNT DATA FSDP HEIGHT ACTION [VISION_MODEL]

ACTION: "all" trains to the end; "kill": the last process is killed while all save the second checkpoint; "term": it is
told to end after step 6. Resumes from the last checkpoint of OUT where there is one. OUT/weights.npy: what was trained.
"rl": GRPO, of VISION_MODEL too, and DPO, OUT/results.npz.
"""

import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
from devices_program import flat, grpo_run, sft, text_dpo, vision_grpo
from saves_program import kill_around_arrays

from jaxtune.checkpoint import checkpoint_steps
from jaxtune.cluster import connect, is_first
from jaxtune.config import ClusterArguments

TIMEOUT = 10  # seconds


class Preemption:
    """Tells this process to end after a step; then steps take long enough for the others to hear of it."""

    def on_step_end(self, trainer, metrics) -> None:
        if trainer.state.global_step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        if trainer.state.global_step >= 6:
            time.sleep(3)


def rl(folder: str, vision_folder: str, out: Path, data: int, fsdp: int) -> None:
    """GRPO, the same again from its first checkpoint, GRPO on images, and DPO."""
    results = {}
    for name, settings in {
        "run": {},
        "resumed": {"resume_from_checkpoint": str(out / "grpo" / "checkpoint-1")},
    }.items():
        found = grpo_run(folder, out / "grpo", data, **settings)
        results |= {f"grpo {name} {key}": value for key, value in found.items()}
    seen = vision_grpo(vision_folder, out / "vision grpo", data, fsdp)
    results |= {f"vision grpo 1x1 {key}": value for key, value in seen.items()}
    results |= {f"dpo 1x1 {key}": value for key, value in text_dpo(folder, out / "dpo", data, fsdp).items()}
    if is_first():
        np.savez(out / "results.npz", **results)


def main() -> None:
    folder, out, coordinator = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    number, count, data, fsdp, height = map(int, sys.argv[4:9])
    connect(ClusterArguments(coordinator, count, number, TIMEOUT))
    jax.config.update("jax_disable_most_optimizations", True)
    if sys.argv[9] == "rl":
        return rl(folder, sys.argv[10], out, data, fsdp)
    action = sys.argv[9] if number == count - 1 else "all"
    if action == "kill":
        kill_around_arrays(before=False, after_saves=1)
    trainer = sft(
        folder, out, data, fsdp, height, save_strategy="steps", save_steps=5,
        resume_from_checkpoint=bool(checkpoint_steps(out)),
        callbacks=[Preemption()] if action == "term" else [],
    )  # fmt: skip
    if is_first():
        np.save(out / "weights.npy", flat(trainer.model))


if __name__ == "__main__":
    main()
