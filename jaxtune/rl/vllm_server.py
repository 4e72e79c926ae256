"""A vLLM server as a trainer sees it: HTTP requests to it, and, where it is jaxtune's own, its process."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from jaxtune.rl import vllm_process

MOST_REQUESTS = 256  # at the same time
LAST_LINES = 25  # of the log, in an error
TOO_LITTLE_MEMORY = "less than desired GPU memory utilization"  # vLLM says it some lines before its last
RUNTIME_LORA = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"  # an environment variable of the server
_ANSWER_SOON = 60.0  # seconds for a request that generates nothing


class VLLMError(RuntimeError):
    """The server is not there, too slow, refuses, or answers nonsense; the message says which, and what to do."""


class ServedModel(NamedTuple):
    """The base model of a server: its name, and the longest sequence that it takes, in tokens."""

    name: str
    max_length: int


class VLLMProcess:
    """vLLM's server as a child process with an environment of its own.

    Args:
        python: of the environment that vLLM is installed in.
        arguments: of the server.
        log: file for all that it prints.
        folders: removed when the server ends, also where the trainer is killed.
    """

    def __init__(self, python: str, arguments: Sequence[str], log: Path, folders: Sequence[Path] = ()):
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        command = [python, vllm_process.__file__, *map(str, folders), "--", *arguments]
        with log.open("wb") as file:
            # A session of its own: Ctrl-C ends a step of the trainer, and not the server that the step may need.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment | {RUNTIME_LORA: "True"},
                start_new_session=True,
            )

    def ended(self, within: float = 0) -> int | None:
        """Its exit code (negative: the signal that ended it); None where it still runs after so many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(within)
        return None

    def advice(self) -> str:
        """What to do about why it has ended, where its log tells."""
        if TOO_LITTLE_MEMORY not in self.log.read_text("utf-8", "replace"):
            return ""
        return (
            ": too little of the GPU's memory is free. Where JAX has taken it, start Python with "
            "XLA_CLIENT_MEM_FRACTION set to 0.9 less vllm_gpu_memory_utilization, or make the latter smaller"
        )

    def last_lines(self) -> str:
        """The end of the log."""
        lines = self.log.read_text("utf-8", "replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-LAST_LINES:])

    def close(self) -> None:
        """Ends it, and all processes that it has started."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2 * vllm_process.GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class VLLMServer:
    """Requests to a server.

    Args:
        url: such as http://127.0.0.1:8000; /v1 at its end changes nothing.
        process: where it is a child of this one.
    """

    def __init__(self, url: str, process: VLLMProcess | None = None):
        self.url = url.rstrip("/").removesuffix("/v1")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"vllm_server_base_url: expected an address such as http://host:8000, got {url!r}"
            )
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        host = "127.0.0.1" if parts.hostname == "0.0.0.0" else parts.hostname
        self._address, self._path = (host, parts.port), parts.path
        self._process = process

    def wait(self, seconds: float) -> None:
        """Returns when the server answers.

        Raises:
            VLLMError: it does not within so many seconds, or has ended.
        """
        deadline, problem = time.monotonic() + seconds, "no answer"
        while True:
            try:
                self._request("GET", "/health", None, max(0.1, min(5.0, deadline - time.monotonic())))
                return
            except VLLMError as error:
                problem = str(error)
            if self._process is not None and self._process.ended() is not None:
                raise VLLMError(self._with_log("vLLM ended while it was starting" + self._process.advice()))
            if time.monotonic() > deadline:
                raise VLLMError(
                    self._with_log(
                        f"vLLM at {self.url} is not up after {seconds:g} s ({problem.splitlines()[0]}); start it, "
                        "correct vllm_server_base_url (or vllm_server_host and _port), or raise vllm_server_timeout"
                    )
                )
            time.sleep(0.2)

    def served_model(self) -> ServedModel:
        """The base model.

        Raises:
            VLLMError: what answers is no vLLM.
        """
        answer = self._json("GET", "/v1/models", None, _ANSWER_SOON)
        try:
            card = next(card for card in answer["data"] if not card.get("parent"))
            return ServedModel(card["id"], int(card["max_model_len"]))
        except (TypeError, KeyError, AttributeError, ValueError, StopIteration) as error:
            raise VLLMError(
                f"{self.url}/v1/models names no model with its max_model_len, as vLLM's server does; it answered "
                f"{json.dumps(answer)[:300]}"
            ) from error

    def load_adapter(self, name: str, folder: Path, rank: int) -> None:
        """Makes the server know an adapter of a rank, read from a folder that it can see too.

        Raises:
            VLLMError: it refuses.
        """
        try:
            payload = {"lora_name": name, "lora_path": str(folder)}
            self._request("POST", "/v1/load_lora_adapter", payload, _ANSWER_SOON)
        except VLLMError as error:
            if self._process is None:
                error.add_note(
                    f"A server that takes adapters is started with {RUNTIME_LORA}=True in its environment and "
                    f"--enable-lora --max-lora-rank {rank} (or more) among its arguments, and sees the folder "
                    f"{folder.parent} (vllm_adapter_dir)."
                )
            raise

    def unload_adapter(self, name: str) -> None:
        """Makes the server forget an adapter."""
        self._request("POST", "/v1/unload_lora_adapter", {"lora_name": name}, _ANSWER_SOON)

    def complete(self, questions: Sequence[tuple[str, dict[str, Any]]], seconds: float) -> list[Any]:
        """Answers to (path, payload), all asked for at the same time.

        Raises:
            VLLMError: one of them failed, or took longer than so many seconds; the others are given up.
        """
        connections: list[http.client.HTTPConnection] = []

        def ask(one: tuple[str, dict[str, Any]]) -> Any:
            return self._json("POST", *one, deadline - time.monotonic(), connections.append)

        deadline = time.monotonic() + seconds
        pool = ThreadPoolExecutor(min(len(questions), MOST_REQUESTS), thread_name_prefix="vllm")
        try:
            return list(pool.map(ask, questions))
        finally:  # after an error the server is told to stop, by the end of the connections
            pool.shutdown(wait=False, cancel_futures=True)
            for connection in connections:
                with contextlib.suppress(OSError, AttributeError):  # closed already
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends the server, if it is a child of this process."""
        if self._process is not None:
            self._process.close()

    def _json(self, *request: Any) -> Any:
        text = self._request(*request)
        try:
            return json.loads(text)
        except ValueError as error:
            raise VLLMError(f"{self.url}{request[1]} answered no JSON: {text[:300]!r}") from error

    def _request(
        self,
        method: str,
        path: str,
        payload: dict[str, Any] | None,
        seconds: float,
        opened: Callable[[http.client.HTTPConnection], object] = lambda connection: None,
    ) -> str:
        """The text of an answer with status 200."""
        asked = f"vLLM: {method} {self.url}{path}"
        connection = self._kind(*self._address, timeout=max(seconds, 0.01))
        try:
            opened(connection)
            body = None if payload is None else json.dumps(payload)
            connection.request(method, self._path + path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read().decode("utf-8", "replace")
        except TimeoutError as error:
            raise VLLMError(self._with_log(f"{asked}: no answer within {seconds:.3g} s")) from error
        except (OSError, http.client.HTTPException) as error:
            raise VLLMError(self._with_log(f"{asked}: {type(error).__name__}: {error}")) from error
        finally:
            connection.close()
        if answer.status != 200:
            raise VLLMError(f"{asked}: status {answer.status}: {_message(text)}")
        return text

    def _with_log(self, message: str) -> str:
        """A message with the end of the server's log, where there is one."""
        if self._process is None:
            return message
        code = self._process.ended(within=1.0)  # the end of a connection is seen before that of the process
        state = "is running" if code is None else f"has ended with code {code}"
        return f"{message}\nthe server {state}; the end of {self._process.log}:\n{self._process.last_lines()}"


def _message(text: str) -> str:
    """What an error answer says, without its wrapping."""
    try:
        found = json.loads(text)
        found = found.get("error", found)
        return str(found.get("message") or found.get("detail") or text)[:1000]
    except (ValueError, AttributeError):
        return text[:1000]


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
