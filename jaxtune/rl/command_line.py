"""The arguments of `python -m jaxtune.rl.train`. Imports neither jax nor transformers."""

import dataclasses
from typing import Any, ClassVar

from jaxtune.command_line import BaseJob
from jaxtune.config import DataSource
from jaxtune.rl.config import GRPOConfig

# The job without a dataset: sums, small enough for two CPU cores and a few minutes.
SHIPPED_TASK: dict[str, Any] = {
    "output_dir": "outputs/sums",
    "max_seq_length": 256,
    "per_device_train_batch_size": 16,
    "num_generations": 8,
    "max_completion_length": 16,
    "max_steps": 30,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
}

DESCRIPTION = """Train a language model by reinforcement (GRPO) on rewards that functions compute.

Without --dataset it trains on the small task that ships with jaxtune (sums), with settings of its own.
Settings may stand in a YAML file (--config), under the names below; the command line wins.

examples:
  python -m jaxtune.rl.train
  python -m jaxtune.rl.train --dataset rows.jsonl --reward_funcs rewards.py:correct --learning_rate 1e-5
  python -m jaxtune.rl.train --config run.yaml --max_steps 100 --log_completions"""


@dataclasses.dataclass(frozen=True)
class PromptArguments(DataSource):
    """The prompts and their rewards."""

    reward_funcs: tuple[str, ...] = ()
    """Functions FILE.py:NAME, or names of jaxtune.rl.rewards such as think_format_reward."""
    prompt_column: str = "prompt"
    """Column that holds the prompt, as messages or text."""
    system_prompt: str | None = None
    """Put before each prompt as a system message; prompts of text become messages of the user."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = (self.reward_funcs,) if isinstance(self.reward_funcs, str) else tuple(self.reward_funcs)
        object.__setattr__(self, "reward_funcs", given)
        if self.dataset is not None and not given:
            raise ValueError("a dataset needs reward_funcs: FILE.py:NAME, or names of jaxtune.rl.rewards")


@dataclasses.dataclass(frozen=True)
class GRPOJob(BaseJob):
    """One run of `python -m jaxtune.rl.train`."""

    PROGRAM: ClassVar[str] = "python -m jaxtune.rl.train"
    DESCRIPTION: ClassVar[str] = DESCRIPTION
    SHIPPED: ClassVar[dict[str, Any]] = SHIPPED_TASK

    data: PromptArguments = dataclasses.field(default_factory=PromptArguments)
    training: GRPOConfig = dataclasses.field(default_factory=GRPOConfig)

    @property
    def share_beside_jax(self) -> float:
        return self.training.share_beside_jax
