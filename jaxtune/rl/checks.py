"""What GRPOTrainer checks of its arguments."""

import warnings
from typing import Any

from jaxtune.rl.config import GRPOConfig


def refuse(**arguments: Any) -> None:
    """Raises ValueError for what TRL's trainer takes and this one does not."""
    advice = {
        "reward_processing_classes": "give reward_funcs=[RewardModel(name, tokenizer=…)]",
        "optimizers": "set optim, learning_rate and lr_scheduler_type in GRPOConfig",
        "peft_config": "call FastLanguageModel.get_peft_model(model, …) first",
    }
    for name, value in arguments.items():
        if value is not None and value != (None, None):
            raise ValueError(f"GRPOTrainer: {name} is not supported; {advice[name]}")


def checked_args(args: GRPOConfig | None) -> GRPOConfig:
    """The settings, defaults where none are given."""
    args = GRPOConfig() if args is None else args
    if not isinstance(args, GRPOConfig):
        raise TypeError(
            f"args must be a jaxtune.GRPOConfig, got {type(args).__name__}; the argument names are the same"
        )
    if args.importance_sampling_level == "sequence" and args.loss_type in (
        "bnpo",
        "dr_grpo",
        "dapo",
        "cispo",
    ):
        warnings.warn(
            f"importance_sampling_level='sequence' with loss_type={args.loss_type!r} weights a completion by its "
            "length; GSPO's own objective is loss_type='grpo'",
            stacklevel=3,
        )
    return args
