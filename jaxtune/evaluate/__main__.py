"""`python -m jaxtune.evaluate MODEL --data …`: accuracy on questions with answers.

Exit status: 0 done, 2 a setting, model or data set that cannot be used (one line), 130 interrupted (what was generated
is kept).
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from jaxtune.evaluate.command import run_command
from jaxtune.evaluate.config import EvaluateConfig
from jaxtune.rl.vllm_config import VLLMConfig

DESCRIPTION = """Let a model answer questions, check the answers, and tell accuracy, pass@k and maj@k (majority vote).

The columns and answers of GSM8K, AIME and MATH are known; for others give --question_column and --answer_column.
What was generated is kept in --output_dir: the same command goes on after a stop, and with another checker or a larger
--n or --limit only what is missing is generated.

examples:
  python -m jaxtune.evaluate Qwen/Qwen2.5-0.5B-Instruct --data openai/gsm8k --dataset_config main
  python -m jaxtune.evaluate outputs/grpo/adapter --data gsm8k/test.jsonl --limit 200
  python -m jaxtune.evaluate MODEL --data math-ai/aime25 --n 16 --temperature 0.6 --top_p 0.95 --max_new_tokens 16384
  python -m jaxtune.evaluate BASE_MODEL --data test.jsonl --few_shot 5 --few_shot_data train.jsonl --checker number
  python -m jaxtune.evaluate MODEL --data test.jsonl --use_vllm --vllm_python vllm-env/bin/python"""


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """One run of `python -m jaxtune.evaluate`."""

    model: tyro.conf.Positional[str]
    """Hugging Face folder or hub id, adapter folder, .gguf file, or output folder of jaxtune.train."""
    data: str
    """Questions with answers: JSONL, JSON, CSV or Parquet file, or hub name."""
    asking: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    serving: VLLMConfig = dataclasses.field(default_factory=VLLMConfig)
    output_dir: Path | None = None
    """Folder for completions and results. None = outputs/evaluate/MODEL_DATA."""
    dataset_config: str | None = None
    """Configuration (subset) of a hub dataset, also of that of few_shot_data."""
    split: str = "test"
    """Split of a hub dataset."""
    question_column: str | None = None
    """Column of the questions. None = question or problem."""
    answer_column: str | None = None
    """Column of the answers. None = answer or solution."""
    limit: int | None = None
    """Ask the first so many questions only."""
    few_shot_data: str | None = None
    """Rows that examples are drawn from: file, or hub name (its split "train")."""
    max_seq_length: int | None = None
    """Tokens of prompt and answer at most. None = the model's own."""
    load_in_4bit: bool | None = None
    """Weights in NF4. None = for an adapter, as QLoRA trains it, and for a 4-bit checkpoint; else 16 bits (CPU: 32)."""
    num_completions_to_print: int = 2
    """Completions to show at the end; all are in the folder."""
    revision: str | None = None
    """Branch, tag or commit of the model's repository."""
    token: Annotated[str | None, tyro.conf.arg(metavar="TOKEN")] = dataclasses.field(default=None, repr=False)
    """Access token of the hub."""
    traceback: bool = False
    """Show where an error came from."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")
        self.serving.check_server()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one evaluation; returns the exit status."""

    def work(settings: Evaluate, command: str) -> None:
        # Only now: --help and a mistyped setting should not wait for jax and transformers.
        from jaxtune.evaluate.job import run

        run(settings, command)

    return run_command(
        "jaxtune.evaluate",
        Evaluate,
        DESCRIPTION,
        work,
        arguments,
        stopped="stopped; the same command goes on with what is missing",
    )


if __name__ == "__main__":
    sys.exit(main())
