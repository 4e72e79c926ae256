"""Quantise a tensor on all cores: chunks of rows go to worker processes through shared memory.

Threads would not do: the NumPy operations of `export.quantisers` are short, and between them only one thread at a
time holds the interpreter. The workers are plain child processes of this module, not multiprocessing's, which
would run the user's script a second time in each of them. They import no JAX.
"""

import json
import mmap
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType

from jaxtune.export.quantisers import quantise, row_bytes

Kind = GGMLQuantizationType
_SLOT = 1 << 20  # weights a worker gets at once
_LARGEST_ROW = 1 << 20  # also the room for the importance of a row
_IN_PLACE = 1 << 17  # tensors up to this size are not worth the trip
_ROOM = 4 * (_SLOT + _LARGEST_ROW + _SLOT)  # bytes a worker shares: weights, importance, result
Progress = Callable[[int], None]


class QuantisePool:
    """Worker processes for `quantise`; use it with `with`. They start with the first tensor large enough.

    Memory: 12 MiB for each process beside its own 60 MB.

    Args:
        processes: how many; by default one for each core this process may use. With 1 there is no child process.
    """

    def __init__(self, processes: int | None = None):
        self.processes = processes or _cores()
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        for worker in self._workers:
            worker.close()
        self._workers.clear()

    def quantise(
        self,
        values: np.ndarray,
        kind: Kind,
        importance: np.ndarray | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """As `quantisers.quantise`, on all processes.

        Args:
            values: float32 [rows, width] or [width].
            kind, importance: as there.
            progress: called with the number of bytes just made, from any thread, one call at a time.

        Returns:
            uint8 [rows, row_bytes].

        Raises:
            ValueError: as there. RuntimeError: a worker process ended (most likely killed for want of memory).
        """
        values = np.atleast_2d(values)
        rows, width = values.shape
        nbytes = row_bytes(kind, width)
        alone = self.processes == 1 or kind == Kind.F32 or width > _LARGEST_ROW
        if alone or values.size <= _IN_PLACE:
            out = quantise(values, kind, importance)
            if progress is not None:
                progress(out.nbytes)
            return out
        out = np.empty((rows, nbytes), np.uint8)
        parts = self._parts(rows, width)
        if not self._workers:
            self._workers = [_Worker() for _ in range(self.processes)]

        def work(worker: _Worker) -> None:
            while (part := self._next(parts)) is not None:
                worker.quantise(values[part], kind, importance, out[part])
                if progress is not None:
                    with self._lock:
                        progress(out[part].nbytes)

        with ThreadPoolExecutor(self.processes) as threads:
            for done in [threads.submit(work, worker) for worker in self._workers]:
                done.result()
        return out

    def _next(self, parts: Iterator[slice]) -> slice | None:
        with self._lock:
            return next(parts, None)

    def _parts(self, rows: int, width: int) -> Iterator[slice]:
        """Row ranges of at most a slot; smaller where the tensor would not keep all workers busy."""
        step = max(1, min(_SLOT // width, -(-rows // (4 * self.processes))))
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Worker:
    """One child process, and the memory shared with it. It answers each line of its input with a line."""

    def __init__(self):
        with _shared_file() as file:
            file.truncate(_ROOM)
            self._memory = mmap.mmap(file.fileno(), _ROOM)
            package = str(Path(__file__).parents[2])
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jaxtune.export.quantise_pool", str(file.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[file.fileno()],
                text=True,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")]),
                },
                start_new_session=True,  # Ctrl-C is for the parent, whose end they notice
            )
        assert self._process.stdin is not None and self._process.stdout is not None, "both are pipes"
        self._orders, self._answers = self._process.stdin, self._process.stdout

    def quantise(
        self, values: np.ndarray, kind: Kind, importance: np.ndarray | None, out: np.ndarray
    ) -> None:
        """Blocks until `out` is filled."""
        rows, width = values.shape
        given, weights, made = _views(self._memory, rows, width, out.shape[1])
        given[:] = values
        if importance is not None:
            weights[:] = importance
        order = {"kind": kind.name, "shape": values.shape, "weighted": importance is not None}
        answer = self._ask(json.dumps(order))
        if "error" in answer:
            raise ValueError(answer["error"])
        out[:] = made

    def _ask(self, order: str) -> dict:
        try:
            self._orders.write(order + "\n")
            self._orders.flush()
            answer = self._answers.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(
                f"a process that quantises ended with status {self._process.wait()}; if the machine ran out of "
                "memory (status -9), try fewer processes"
            )
        return json.loads(answer)

    def close(self) -> None:
        with suppress(BrokenPipeError):  # it is dead, and an order still lies in the buffer
            self._orders.close()
        self._answers.close()
        self._process.wait()


def _shared_file():
    """A file without a name, in memory where the system can; /dev/shm is often too small in containers."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("jaxtune"), "w+b")
    return tempfile.TemporaryFile()


def _views(
    memory: mmap.mmap, rows: int, width: int, nbytes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights float32 [rows, width], importance float32 [width], result uint8 [rows, nbytes]."""
    values = np.frombuffer(memory, np.float32, rows * width).reshape(rows, width)
    importance = np.frombuffer(memory, np.float32, width, 4 * _SLOT)
    result = np.frombuffer(memory, np.uint8, rows * nbytes, 4 * (_SLOT + _LARGEST_ROW))
    return values, importance, result.reshape(rows, nbytes)


def _serve(descriptor: int) -> None:
    """The worker: orders on standard input, one JSON line each, until it is closed."""
    memory = mmap.mmap(descriptor, _ROOM)
    for line in sys.stdin:
        order = json.loads(line)
        kind, (rows, width) = Kind[order["kind"]], order["shape"]
        values, importance, result = _views(memory, rows, width, row_bytes(kind, width))
        try:
            result[:] = quantise(values, kind, importance if order["weighted"] else None)
            answer = {}
        except ValueError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
