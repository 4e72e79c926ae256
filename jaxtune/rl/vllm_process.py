"""A program that runs vLLM's server in vLLM's own environment, and ends it when the trainer is gone.

    python vllm_process.py FOLDER... -- ARGUMENTS...        (vllm_server starts it)

It needs nothing but Python and vLLM. Its standard input is held open by the trainer: when that closes, in whatever way
the trainer came to its end, the folders are removed and the whole process group is stopped.
"""

import os
import runpy
import shutil
import signal
import sys
import threading
import time

GRACE = 5.0  # seconds between the request to stop and the end of it all


def end_with_trainer(folders: list[str]) -> None:
    """Waits for the end of standard input; then nothing of the process group is left."""
    while os.read(0, 1024):
        pass
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGTERM)
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    divide = sys.argv.index("--")
    folders, arguments = sys.argv[1:divide], sys.argv[divide + 1 :]
    threading.Thread(target=end_with_trainer, args=(folders,), daemon=True).start()
    sys.argv = ["vllm", *arguments]
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


if __name__ == "__main__":  # vLLM's own processes import this file again
    main()
