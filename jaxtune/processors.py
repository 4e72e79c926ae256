"""A vision-language model's processor, as transformers has it: its tokenizer and its image processor.

Images are processed by transformers' PIL backend, never by torchvision: the two resize differently, and a model must
see the same pixels in training, in generation and on a machine without torch. Video processors exist for torchvision
alone, so a processor here has none.
"""

from functools import cache
from pathlib import Path
from typing import Any

IMAGE_PARTS = ("image_processor", "tokenizer")


def load_processor(folder: str | Path, model_type: str, tokenizer: Any) -> Any:
    """The processor of a Hugging Face folder.

    Args:
        folder: with preprocessor_config.json or processor_config.json.
        model_type: of config.json; says which processor class.
        tokenizer: what its text goes through.

    Returns:
        An instance of transformers' own class (`Qwen2_5_VLProcessor`, …), its image processor of the PIL backend,
        without a video processor. Its chat template is the folder's, or the tokenizer's.

    Raises:
        ValueError: transformers has no processor for this model_type. OSError: the folder has no image processor.
    """
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    if model_type not in PROCESSOR_MAPPING_NAMES:
        raise ValueError(
            f"transformers {transformers.__version__} has no processor for models of type {model_type!r}"
        )
    kind = without_video(getattr(transformers, PROCESSOR_MAPPING_NAMES[model_type]))
    images = transformers.AutoImageProcessor.from_pretrained(
        str(folder), backend="pil", local_files_only=True
    )
    settings, _ = kind.get_processor_dict(str(folder), local_files_only=True)
    settings.setdefault("chat_template", tokenizer.chat_template)
    return kind.from_args_and_dict([images, tokenizer], settings)


@cache
def without_video(kind: type) -> type:
    """A processor class whose instances have an image processor and a tokenizer alone; its name stays.

    >>> from transformers import Qwen2_5_VLProcessor
    >>> without_video(Qwen2_5_VLProcessor).get_attributes()
    ['image_processor', 'tokenizer']
    """
    parts = [part for part in kind.get_attributes() if part in IMAGE_PARTS]

    def reduce(self: Any) -> tuple:
        return _restore, (kind, self.__dict__)

    own = {
        "get_attributes": classmethod(lambda _: list(parts)),
        "__reduce__": reduce,
        "__module__": kind.__module__,
    }
    return type(kind.__name__, (kind,), own)


def _restore(kind: type, state: dict[str, Any]) -> Any:
    """What a processor is unpickled with: its class has no module to be found in."""
    processor = object.__new__(without_video(kind))
    processor.__dict__.update(state)
    return processor
