"""Completions for people: a table in the terminal, Parquet files, and a page for the browser.

output_dir/completions/
  completions_00010.parquet   TRL's columns: step, prompt, completion, <reward function>…, <log_extra>…, advantage
  index.html                  made of page/: the newest completions of every step, grouped by prompt, best first

Completions of an evaluation have no step and no advantage: columns and headings are without them.
"""

import html
import itertools
import json
import math
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
from pyarrow import parquet

from jaxtune.rl.experience import Sample

PAGE_STEPS = 50  # steps that the page shows, the newest
PAGE_SAMPLES = 64  # completions of each


def text_of(value: Any) -> str:
    """Text, or messages as "role: content" blocks."""
    if isinstance(value, str):
        return value
    if len(value) == 1 and value[0].get("role") == "assistant":
        return _content(value[0])
    return "\n".join(f"{message.get('role')}: {_content(message)}" for message in value)


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=repr)


class CompletionLog:
    """Gathers samples and tells of them at each log.

    Args:
        folder: output_dir/completions.
        names: of the reward functions.
        count: completions to print; None: all.
        unique: print one of each prompt only.
        shown: completions of each step that the page shows.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], count: int | None, unique: bool, shown: int = PAGE_SAMPLES
    ):
        self._folder, self._names = Path(folder), list(names)
        self._count, self._unique, self._shown = count, unique, shown
        self._samples: list[Sample] = []

    def add(self, samples: Iterable[Sample]) -> None:
        self._samples += samples

    def flush(self, step: int | None, kind: str = "completions") -> str:
        """Write what has gathered, in output_dir/completions; returns the table for the terminal."""
        samples, self._samples = self._samples, []
        if not samples:
            return ""
        self._folder.mkdir(parents=True, exist_ok=True)
        table = self._table(samples, step).with_format("arrow")[:]
        number = [] if step is None else [f"{step:05d}"]
        parquet.write_table(table, self._folder / f"{'_'.join([kind, *number])}.parquet")
        part = self._folder / "page" / f"{'_'.join([*number, kind])}.html"
        part.parent.mkdir(exist_ok=True)
        title = kind if step is None else f"step {step}"
        part.write_text(_section(samples, self._names, title, self._shown), encoding="utf-8")
        self._write_page()
        return self._text(samples, title)

    def _table(self, samples: list[Sample], step: int | None) -> datasets.Dataset:
        columns: dict[str, list[Any]] = {} if step is None else {"step": [step] * len(samples)}
        columns |= {
            "prompt": [sample.prompt for sample in samples],
            "completion": [sample.completion for sample in samples],
        }
        for i, name in enumerate(self._names):
            columns[name] = [float(sample.rewards[i]) for sample in samples]
        for name in dict.fromkeys(name for sample in samples for name in sample.extra):
            columns[name] = [sample.extra.get(name) for sample in samples]
        if step is not None:
            columns["advantage"] = [sample.advantage for sample in samples]
        return datasets.Dataset.from_dict(columns, on_mixed_types="use_json")

    def _text(self, samples: list[Sample], title: str) -> str:
        """A block for each completion, as wide as the terminal."""
        width = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 120)
        if self._unique:
            samples = list({json.dumps(s.prompt, default=repr): s for s in reversed(samples)}.values())[::-1]
        shown = samples if self._count is None else samples[: self._count]
        lines = [f" {title} ".center(width, "═")]
        for prompt, group in itertools.groupby(shown, key=lambda sample: text_of(sample.prompt)):
            lines += _wrapped("prompt", prompt, width)
            for sample in group:
                lines += ["·" * width, *_wrapped("completion", text_of(sample.completion), width)]
                lines.append(f"{'rewards':<11}{_scores(sample, self._names)}")
            lines.append("─" * width)
        if len(shown) < len(samples):
            lines.append(f"and {len(samples) - len(shown)} more in {self._folder}")
        return "\n".join(lines)

    def _write_page(self) -> None:
        """index.html from the sections of the newest steps."""
        sections = sorted((self._folder / "page").glob("*.html"), reverse=True)
        for old in sections[PAGE_STEPS:]:
            old.unlink()
        parts = [path.read_text(encoding="utf-8") for path in sections[:PAGE_STEPS]]
        (self._folder / "index.html").write_text(PAGE.replace("SECTIONS", "\n".join(parts)), encoding="utf-8")


def _scores(sample: Sample, names: Sequence[str]) -> str:
    parts = [f"{name} {value:.4g}" for name, value in zip(names, sample.rewards, strict=True)]
    if not math.isnan(sample.advantage):
        parts.append(f"advantage {sample.advantage:+.3f}")
    return ", ".join([*parts, *(f"{name} {value}" for name, value in sample.extra.items())])


def _wrapped(label: str, text: str, width: int) -> list[str]:
    """Text with a label in front, its lines folded."""
    room = width - 11
    folded = [part for line in text.splitlines() or [""] for part in textwrap.wrap(line, room) or [""]]
    return [f"{label if i == 0 else '':<11}{line}" for i, line in enumerate(folded)]


def _merit(sample: Sample) -> float:
    """Above 0: good, below: bad. The advantage, or without one whether the first reward reaches a half."""
    return float(sample.rewards[0]) - 0.5 if math.isnan(sample.advantage) else sample.advantage


def _section(samples: list[Sample], names: Sequence[str], title: str, most: int) -> str:
    """Completions as HTML, by prompt, the best first."""
    mean = sum(sample.rewards[sample.rewards == sample.rewards].sum() for sample in samples) / len(samples)
    parts = [f"<details open><summary>{title}: {len(samples)} completions, mean reward {mean:.3f}</summary>"]
    shown = samples[:most]
    for prompt, group in itertools.groupby(shown, key=lambda sample: text_of(sample.prompt)):
        parts.append(f"<article><pre class=prompt>{html.escape(prompt)}</pre>")
        for sample in sorted(group, key=_merit, reverse=True):
            tone = "good" if _merit(sample) > 0 else "bad" if _merit(sample) < 0 else "flat"
            scores = html.escape(_scores(sample, names))
            cut = "" if sample.ended else " <em>cut at the longest length</em>"
            body = html.escape(text_of(sample.completion))
            parts.append(f"<div class={tone}><p>{scores}{cut}</p><pre>{body}</pre></div>")
        parts.append("</article>")
    if len(shown) < len(samples):
        parts.append(f"<p>{len(samples) - len(shown)} more are in the Parquet file.</p>")
    return "\n".join([*parts, "</details>"])


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Completions</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
summary { font-weight: 600; cursor: pointer; margin: 1rem 0 .5rem; }
article { border: 1px solid #ddd; border-radius: 6px; margin: 0 0 1rem; overflow: hidden; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: 13px/1.5 ui-monospace, monospace; }
.prompt { background: #f4f4f4; padding: .6rem .8rem; }
article div { border-left: 5px solid #bbb; padding: .5rem .8rem; border-top: 1px solid #eee; }
article div.good { border-left-color: #2a9d60; } article div.bad { border-left-color: #d1495b; }
article p { margin: 0 0 .3rem; color: #666; font-size: 13px; } em { color: #d1495b; }
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd; } article { border-color: #333; } .prompt { background: #222; }
  article div { border-top-color: #2a2a2a; } article p { color: #999; }
}
</style>
<h1>Completions</h1>
SECTIONS
</html>
"""
