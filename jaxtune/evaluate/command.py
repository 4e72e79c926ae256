"""What the commands of evaluation share: settings from the command line, and errors as one line."""

import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from jaxtune.rl.vllm_server import VLLMError


def run_command(
    module: str,
    settings: Any,
    description: str,
    work: Callable[[Any, str], Any],
    arguments: Sequence[str] | None,
    *,
    stopped: str = "stopped",
) -> int:
    """Parse `settings` (a dataclass with a field traceback) and do the work; returns the exit status.

    Args:
        module: as python -m has it. work: gets the settings and the command, without an access token.
        arguments: of the command line; None: this process's. stopped: what is said when it is interrupted.
    """
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would say that there is no PyTorch
    given, command = sys.argv[1:] if arguments is None else list(arguments), f"python -m {module}"
    try:
        found = tyro.cli(
            settings,
            prog=command,
            description=description,
            args=given,
            use_underscores=True,
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except (ValueError, TypeError) as error:
        return _fail(error)
    try:
        work(found, f"{command} {shlex.join(_without_token(given))}")
    except (ValueError, TypeError, OSError, ImportError, VLLMError) as error:
        if found.traceback:
            raise
        return _fail(error)
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
    return 0


def _without_token(given: Sequence[str]) -> list[str]:
    """The arguments without the access token, which is written nowhere."""
    kept = [one for i, one in enumerate(given) if i == 0 or given[i - 1] != "--token"]
    return [one for one in kept if one != "--token" and not one.startswith("--token=")]


def _fail(error: Exception) -> int:
    """Says an error: in one line, but for what the log of a server adds."""
    said = "\n".join([str(error), *getattr(error, "__notes__", [])])
    print(f"error: {said if isinstance(error, VLLMError) else ' '.join(said.split())}", file=sys.stderr)
    return 2
