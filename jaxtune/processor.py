"""The processor of a vision-language checkpoint: transformers' own, with images through Pillow.

transformers has two backends for images whose results differ a little; here it is always Pillow's, which needs neither
torch nor torchvision. Some processors also want one for videos, which does need them: it is left out.
"""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

PROCESSOR, VIDEO, IMAGE = (
    "processor_config.json",
    "video_preprocessor_config.json",
    "preprocessor_config.json",
)


def load_processor(folder: Path, tokenizer: Any, model_type: str) -> Any:
    """transformers' processor of a folder, around a tokenizer that is there already.

    Raises:
      FileNotFoundError: the folder says nothing of images.
    """
    if not any((folder / name).exists() for name in (PROCESSOR, IMAGE)):
        raise FileNotFoundError(f"{folder} has no processor: expected {IMAGE} or {PROCESSOR}")
    from transformers import AutoImageProcessor

    images = AutoImageProcessor.from_pretrained(
        str(folder), backend="pil", trust_remote_code=False, local_files_only=True
    )
    return _class(model_type).of_parts(folder, images, tokenizer)


@cache
def _class(model_type: str) -> Any:
    """The processor's class of a model type, made to do without videos."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    base = getattr(transformers, PROCESSOR_MAPPING_NAMES[model_type])

    class ImageProcessor(base):
        """transformers' processor of text and images."""

        @classmethod
        def of_parts(cls, folder: Path, images: Any, tokenizer: Any) -> Any:
            fields, kwargs = cls.get_processor_dict(str(folder), local_files_only=True)
            parts = {"image_processor": images, "tokenizer": tokenizer}
            made = cls.from_args_and_dict(
                [parts.get(name) for name in cls.get_attributes()], fields, **kwargs
            )
            made.chat_template = made.chat_template or tokenizer.chat_template
            made.source = str(folder)
            return made

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor" and argument is None:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

        def __call__(self, *args, videos=None, **kwargs) -> Any:
            if videos:
                raise ValueError("videos are not supported; give images")
            return super().__call__(*args, **kwargs)

        def apply_chat_template(self, *args, **kwargs) -> Any:
            # not SmolVLM's own, which asks its processor of videos
            return transformers.ProcessorMixin.apply_chat_template(self, *args, **kwargs)

        def save_pretrained(self, save_directory: str | Path, **_) -> None:
            _save(self, Path(save_directory))

        def __reduce__(self):
            return _rebuilt, (model_type, self.__dict__)

    ImageProcessor.__name__ = base.__name__
    return ImageProcessor


def _rebuilt(model_type: str, state: dict[str, Any]) -> Any:
    kind = _class(model_type)
    made = kind.__new__(kind)
    made.__dict__.update(state)
    return made


def _save(processor: Any, folder: Path) -> None:
    """Writes what transformers loads again: tokenizer, images, template, and what the checkpoint says of videos."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(processor.chat_template, str):
        processor.tokenizer.chat_template = processor.chat_template
    processor.tokenizer.save_pretrained(str(folder))
    fields, source = processor.image_processor.to_dict(), Path(processor.source)
    fields["image_processor_type"] = fields["image_processor_type"].removesuffix("Pil")
    fields["processor_class"] = type(processor).__name__
    (folder / IMAGE).write_text(json.dumps(fields, indent=2) + "\n", "utf-8")
    if (source / PROCESSOR).exists():
        whole = json.loads((source / PROCESSOR).read_text("utf-8"))
        whole |= {"image_processor": fields} if "image_processor" in whole else {}
        (folder / PROCESSOR).write_text(json.dumps(whole, indent=2) + "\n", "utf-8")
    if (source / VIDEO).exists():
        shutil.copy(source / VIDEO, folder / VIDEO)
