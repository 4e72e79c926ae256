"""Save an adapter in PEFT's format: adapter_model.safetensors, adapter_config.json and the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtune.export.folder import staged_folder
from jaxtune.formats.safetensors_writer import ShardWriter
from jaxtune.hub import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from jaxtune.lora import adapter_tensors, config_to_peft, on_whole_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxtune.model import Model


def save_adapter(
    model: Model,
    directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    with_tokenizer: bool = True,
    of_checkpoint: bool = True,
) -> None:
    """Write the adapter of a model, float32, with its tokenizer (chat template included).

    That of a model loaded with text_only=True fits the whole vision-language model, whose name it has as its base.

    Args:
        model: a model with an adapter.
        directory: folder to make; see `export.folder` for what happens to an existing one.
        tokenizer: saved beside the adapter, or a processor; by default the model's.
        with_tokenizer: False: the adapter alone.
        of_checkpoint: False: with text_only=True, for the text model as `save_merged` writes it.

    Raises:
        ValueError: the model has no adapter, or a tensor holds NaN or infinity (it is named).
        OSError: the disk is too full.
    """
    if model.lora is None:
        raise ValueError("the model has no adapter; call FastLanguageModel.get_peft_model first")
    tensors, lora = adapter_tensors(model), model.lora
    for name, value in tensors.items():
        check_finite(name, value)
    if of_checkpoint and model.checkpoint.text_reader is not None:
        lora, tensors = on_whole_model(lora, tensors, model.checkpoint.text_reader)
        given = tokenizer or model.tokenizer
        tokenizer = None if given is None else model.checkpoint.whole_tokenizer(given)
    config = config_to_peft(lora, model.name_or_path, model.checkpoint.revision)
    with staged_folder(directory, sum(value.nbytes for value in tensors.values())) as folder:
        with ShardWriter(folder, list(tensors), "1TB", single=ADAPTER_WEIGHTS) as writer:
            for name, value in sorted(tensors.items()):
                writer.add({name: value})
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        if with_tokenizer:
            save_processing(model, folder, tokenizer)


def save_processing(model: Model, folder: Path, given: Any = None) -> None:
    """Writes a tokenizer or processor, by default the model's; of a tokenizer for a vision-language model the rest of
    its processor too."""
    parts = [given or model.processor or model.tokenizer]
    if model.processor is not None and not hasattr(parts[0], "image_processor"):
        parts.insert(0, model.processor)
    for part in parts:
        if part is not None:
            part.save_pretrained(str(folder))


def check_finite(name: str, value: np.ndarray) -> None:
    """Raises ValueError naming a tensor that holds NaN or infinity."""
    bad = value.size - int(np.isfinite(value).sum())
    if bad:
        raise ValueError(
            f"{name}: {bad:,} of {value.size:,} values are NaN or infinite; nothing was saved. "
            "The training diverged, or the type to save in is too narrow (use bfloat16)."
        )
