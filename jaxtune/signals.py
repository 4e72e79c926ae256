"""SIGINT and SIGTERM as a request to finish the step and save; the second one aborts."""

import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While entered, the first SIGINT or SIGTERM only sets `received`; the old handlers come back on exit.

    Outside the main thread Python allows no handlers; there it does nothing. numbers: the signals; in a run of several
    processes SIGTERM is jax's, see cluster.is_preempted.
    """

    def __init__(self, numbers: Sequence[signal.Signals] = SIGNALS) -> None:
        self._numbers = numbers
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in self._numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt(f"{signal.Signals(number).name} a second time: stopped without saving")
        self.received = signal.Signals(number)
        text = f"\n{self.received.name}: finishing the step and saving; once more to stop at once\n"
        os.write(2, text.encode())  # print is not safe inside a handler

    def reraise(self) -> None:
        """End as the signal asks for, once all is saved: KeyboardInterrupt or SystemExit(128 + number)."""
        if self.received is signal.SIGINT:
            raise KeyboardInterrupt("SIGINT: stopped after a step, checkpoint saved")
        if self.received is not None:
            raise SystemExit(128 + self.received)
