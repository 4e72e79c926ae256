"""Calls in a thread of their own: with a time limit, or where an event loop runs already (as in a notebook)."""

import threading
from collections.abc import Callable
from typing import Any


def apart(call: Callable[[], Any], timeout: float | None = None) -> Any:
    """The result of a call.

    Raises:
        TimeoutError: it is not there after `timeout` seconds; the thread goes on by itself.
    """
    outcome: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            outcome.append((True, call()))
        except BaseException as error:  # noqa: BLE001  raised again below
            outcome.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout)
    if not outcome:
        raise TimeoutError
    worked, value = outcome[0]
    if not worked:
        raise value
    return value
