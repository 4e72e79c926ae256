"""jaxtune: QLoRA fine-tuning in JAX. The public names; each is imported when it is first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtune.config import SFTConfig
    from jaxtune.data import (
        UnslothVisionDataCollator,
        VisionDataCollator,
        get_chat_template,
        standardize_sharegpt,
        train_on_responses_only,
    )
    from jaxtune.fast import (
        FastLanguageModel,
        FastModel,
        FastVisionModel,
        is_bf16_supported,
        is_bfloat16_supported,
    )
    from jaxtune.generate import SamplingParams, TextStreamer
    from jaxtune.lora import LoraConfig
    from jaxtune.model import Model
    from jaxtune.models.remat import Remat
    from jaxtune.rl.config import GRPOConfig
    from jaxtune.rl.dpo import DPOTrainer
    from jaxtune.rl.dpo_config import DPOConfig
    from jaxtune.rl.trainer import GRPOTrainer
    from jaxtune.step import make_eval_step, make_train_step
    from jaxtune.trainer import SFTTrainer

_HOMES = {
    "DPOConfig": "jaxtune.rl.dpo_config",
    "DPOTrainer": "jaxtune.rl.dpo",
    "FastLanguageModel": "jaxtune.fast",
    "FastModel": "jaxtune.fast",
    "FastVisionModel": "jaxtune.fast",
    "GRPOConfig": "jaxtune.rl.config",
    "GRPOTrainer": "jaxtune.rl.trainer",
    "LoraConfig": "jaxtune.lora",
    "Model": "jaxtune.model",
    "Remat": "jaxtune.models.remat",
    "SFTConfig": "jaxtune.config",
    "SFTTrainer": "jaxtune.trainer",
    "SamplingParams": "jaxtune.generate",
    "TextStreamer": "jaxtune.generate",
    "UnslothVisionDataCollator": "jaxtune.data",
    "VisionDataCollator": "jaxtune.data",
    "get_chat_template": "jaxtune.data",
    "is_bf16_supported": "jaxtune.fast",
    "is_bfloat16_supported": "jaxtune.fast",
    "make_eval_step": "jaxtune.step",
    "make_train_step": "jaxtune.step",
    "standardize_data_formats": "jaxtune.data",
    "standardize_sharegpt": "jaxtune.data",
    "to_sharegpt": "jaxtune.data",
    "train_on_responses_only": "jaxtune.data",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"jaxtune has no {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
