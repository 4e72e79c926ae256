"""What a GPU draws while a benchmark runs, as nvidia-smi says ten times a second."""

import contextlib
import dataclasses
import os
import shutil
import statistics
import subprocess
from collections.abc import Iterator

FIELDS = "power.draw.instant,power.limit,clocks.sm,clocks_event_reasons.sw_power_cap"


@dataclasses.dataclass(frozen=True)
class Draw:
    """Means over a run: watts and the card's limit of them, the multiprocessors' clock in MHz, and the share of the
    time in which the driver held the clock down to stay within the limit."""

    watts: float
    limit: float
    megahertz: float
    capped: float

    def said(self) -> str:
        return f"{self.watts:.0f} of {self.limit:.0f} W at {self.megahertz:.0f} MHz, capped {self.capped:.0%}"


@contextlib.contextmanager
def drawn() -> Iterator[list[Draw]]:
    """A list that has the first visible GPU's Draw when the block is left; none where nvidia-smi does not say it."""
    found: list[Draw] = []
    if shutil.which("nvidia-smi") is None:
        yield found
        return
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = [
        "nvidia-smi",
        f"--query-gpu={FIELDS}",
        "--format=csv,noheader,nounits",
        "-lms",
        "100",
        "-i",
        gpu,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield found
    finally:
        process.terminate()
        said, _ = process.communicate()
    rows = [row for line in said.splitlines() if (row := _row(line)) is not None]
    if rows:
        found.append(Draw(*map(statistics.fmean, zip(*rows, strict=True))))


def _row(line: str) -> tuple[float, float, float, bool] | None:
    """None for a line that was cut off, and where the card does not say one of the fields."""
    try:
        watts, limit, megahertz, capped = line.split(", ")
        return float(watts), float(limit), float(megahertz), capped == "Active"
    except ValueError:
        return None
