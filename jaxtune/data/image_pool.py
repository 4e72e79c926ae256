"""An ImageEncoder in worker processes, so that images are decoded and processed while the device computes.

The workers are plain child processes of this module, not multiprocessing's: those would run the user's script a second
time in each, or fork a process in which jax's threads run. They import neither jax nor torch. Calls and results are
pickled through pipes; a thread for each worker waits for its answers.
"""

import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from jaxtune.data.image_encoder import EncodedDocument, EncodedPrompt, ImageArrays, ImageEncoder
from jaxtune.data.image_rows import Document
from jaxtune.data.images import ImageError

_PIPE = 1 << 20  # bytes a pipe holds, where the system lets us ask
MOST_WORKERS = 8
# Where torch is installed transformers imports it: seconds and memory that no image needs.
_PROGRAM = """
import sys
sys.modules["torch"] = sys.modules["torchvision"] = None
from jaxtune.data.image_pool import serve
serve()
"""


def default_workers() -> int:
    """One for each core but one, 8 at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cores - 1))


class ImagePool:
    """Calls an encoder's methods in `workers` processes; they start with the first call.

    Args:
        encoder: what each worker has.
        workers: how many processes; 0: calls run in this one, when they are made.
    """

    def __init__(self, encoder: ImageEncoder, workers: int):
        self.encoder, self.workers = encoder, workers
        self._threads: ThreadPoolExecutor | None = None
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._all: list[_Worker] = []

    def encode(
        self, documents: Sequence[Document | ImageError]
    ) -> "Future[list[EncodedDocument | ImageError]]":
        """`ImageEncoder.encode` of each; in the place of one that fails, or has failed before, is why."""
        return self._submit("encode_all", documents)

    def arrays(
        self, documents: Sequence[Document], lengths: Sequence[int], digests: Sequence[bytes], sizes: Any
    ) -> "Future[ImageArrays]":
        """`ImageEncoder.arrays` of a micro-batch."""
        return self._submit("arrays", documents, lengths, digests, sizes)

    def prompt(self, document: Document) -> "Future[EncodedPrompt]":
        """`ImageEncoder.prompt`."""
        return self._submit("prompt", document)

    def close(self) -> None:
        """Ends the processes; the next call starts new ones."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for worker in self._all:
            worker.close()
        self._threads, self._all, self._idle = None, [], SimpleQueue()

    def _submit(self, name: str, *arguments: Any) -> Future:
        if not self.workers:
            future: Future = Future()
            try:
                future.set_result(call(self.encoder, name, arguments))
            except Exception as error:  # noqa: BLE001  raised again where the result is asked for
                future.set_exception(error)
            return future
        if self._threads is None:
            state = pickle.dumps(self.encoder)
            self._all = [_Worker(state) for _ in range(self.workers)]
            for worker in self._all:
                self._idle.put(worker)
            self._threads = ThreadPoolExecutor(self.workers)
        return self._threads.submit(self._call, name, arguments)

    def _call(self, name: str, arguments: tuple) -> Any:
        worker = self._idle.get()
        try:
            return worker.ask(name, arguments)
        finally:
            self._idle.put(worker)


def call(encoder: ImageEncoder, name: str, arguments: tuple) -> Any:
    """What a worker is asked for."""
    if name != "encode_all":
        return getattr(encoder, name)(*arguments)
    found: list[EncodedDocument | ImageError] = []
    for document in arguments[0]:
        try:
            found.append(document if isinstance(document, ImageError) else encoder.encode(document))
        except ImageError as error:
            found.append(error)
    return found


class _Worker:
    """One child process; it answers each call with (worked, result or exception)."""

    def __init__(self, encoder: bytes):
        package = str(Path(__file__).parents[2])
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")]),
                # many workers side by side: one thread each
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # it would say that there is no PyTorch
            },
            start_new_session=True,  # Ctrl-C is for the parent, whose end they notice
        )
        assert self._process.stdin is not None and self._process.stdout is not None, "both are pipes"
        self._calls, self._answers = self._process.stdin, self._process.stdout
        _widen(self._answers.fileno())
        self._encoder: bytes | None = encoder

    def ask(self, name: str, arguments: tuple) -> Any:
        """Blocks until the answer is there.

        Raises:
            What the call raised. RuntimeError: the process ended.
        """
        try:
            if self._encoder is not None:  # not when it starts: writing would wait for its imports
                pickle.dump(self._encoder, self._calls)
                self._encoder = None
            pickle.dump((name, arguments), self._calls, protocol=5)
            self._calls.flush()
            worked, value = pickle.load(self._answers)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise RuntimeError(
                f"a process that prepares images ended with status {self._process.wait()}; what it wrote stands above. "
                "If the machine ran out of memory (status -9), set dataloader_num_workers lower"
            ) from error
        if worked:
            return value
        raise value

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self._calls.close()
        self._answers.close()
        self._process.wait()


def _widen(pipe: int) -> None:
    """Makes a pipe hold more, so that large arrays take fewer turns."""
    with suppress(ImportError, AttributeError, OSError):
        fcntl = importlib.import_module("fcntl")
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE)


def serve() -> None:
    """The worker: calls on standard input until it is closed, answers on standard output."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    calls = sys.stdin.buffer
    try:
        encoder = pickle.loads(pickle.load(calls))
        while True:
            name, arguments = pickle.load(calls)
            try:
                answer = True, call(encoder, name, arguments)
            except Exception as error:  # noqa: BLE001  the parent raises it
                answer = False, error
            pickle.dump(answer, answers, protocol=5)
            answers.flush()
    except (EOFError, BrokenPipeError):
        return
