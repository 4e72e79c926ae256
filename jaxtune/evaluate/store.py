"""The folder of an evaluation.

output_dir/
  settings.json        what decides the completions: model, data, prompts, sampling
  completions.jsonl    the completions, line by line as they come; a restart goes on after them
  results.json         metrics and everything that is needed to repeat them
  completions/         completions.parquet and index.html, with verdicts
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.evaluate.results import Completion, Results
from jaxtune.rl.completions import CompletionLog

SETTINGS, COMPLETIONS, RESULTS = "settings.json", "completions.jsonl", "results.json"
PAGE_COMPLETIONS = 2000  # that the page shows


class Store:
    """Completions of one evaluation, kept across restarts.

    Args:
        folder: made where it is not there.
        settings: what decides the completions, as JSON knows it.
        prompts: of each question, a digest of its prompt.

    Raises:
        ValueError: the folder holds completions of other settings or prompts; they are named.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], prompts: Sequence[str]):
        self._folder, self._prompts = Path(folder), prompts
        self._folder.mkdir(parents=True, exist_ok=True)
        self._check_settings(json.loads(json.dumps(settings)))

    def _check_settings(self, settings: dict[str, Any]) -> None:
        file = self._folder / SETTINGS
        if not file.exists():
            _write(file, settings)
            return
        there = json.loads(file.read_text("utf-8"))
        changed = [name for name in {**there, **settings} if there.get(name) != settings.get(name)]
        if changed:
            name = changed[0]
            raise ValueError(
                f"{self._folder} holds the completions of another evaluation: {name} was {there.get(name)!r}, is now "
                f"{settings.get(name)!r}. Give another output_dir, or delete that folder"
            )

    def completions(self) -> dict[tuple[int, int], Completion]:
        """(question, sample) -> completion, of the questions asked now; a half-written last line is cut off."""
        file = self._folder / COMPLETIONS
        if not file.exists():
            return {}
        whole, _, rest = file.read_bytes().rpartition(b"\n")
        if rest:
            os.truncate(file, len(whole) + bool(whole))
        found = {}
        for line in whole.splitlines():
            values = json.loads(line)
            prompt, one = values.pop("prompt"), Completion(**values)
            if one.question >= len(self._prompts):
                continue
            if prompt != self._prompts[one.question]:
                raise ValueError(
                    f"{self._folder} holds completions of other prompts, first at question {one.question}: the data, "
                    "the chat template, system_prompt, instruction or the examples have changed. Give another "
                    "output_dir, or delete that folder"
                )
            found[one.question, one.sample] = one
        return found

    def save(self, completions: Sequence[Completion]) -> None:
        """Append completions."""
        lines = [
            json.dumps({"prompt": self._prompts[one.question], **one._asdict()}, ensure_ascii=False) + "\n"
            for one in completions
        ]
        with (self._folder / COMPLETIONS).open("a", encoding="utf-8") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())

    def finish(self, results: Results, about: Mapping[str, Any], printed: int) -> str:
        """Write results and completions; returns `printed` completions as a table for the terminal."""
        _write(self._folder / RESULTS, {**results.to_json(), **about})
        log = CompletionLog(
            self._folder / "completions", ["correct"], printed, unique=False, shown=PAGE_COMPLETIONS
        )
        log.add(results.samples())
        return log.flush(None)


def _write(file: Path, values: Mapping[str, Any]) -> None:
    part = file.with_suffix(".part")
    part.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(file)
