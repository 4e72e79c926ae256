"""Prompts as people write them, texts or chats with images in them or beside them, to tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtune import images
from jaxtune.data.image_encoder import ImageEncoder
from jaxtune.data.image_rows import read_row
from jaxtune.data.resize import resize_policy


def is_written(prompts: Any) -> bool:
    """Whether these are texts or chats, one or several, and no token ids."""
    if isinstance(prompts, (str, Mapping)):
        return isinstance(prompts, str)
    if not isinstance(prompts, (list, tuple)) or not prompts:
        return False
    first = prompts[0]
    return isinstance(first, str) or _is_message(first) or (isinstance(first, list) and _is_message(first[0]))


def read_prompts(
    model: Any, prompts: Any, pictures: Any = None
) -> tuple[list[list[int]], list[images.Processed] | None]:
    """The tokens of each prompt, and what the processor gave of its images (None where no prompt has any).

    Args:
        model: a `jaxtune.model.Model`.
        prompts: a text or a chat, or a list of them. A chat is a list of messages, whose contents may have images in
            them (see `data.image_rows`); it is rendered up to the answer's beginning. Texts are taken as they are,
            those beside images without special tokens in front.
        pictures: of each prompt, a list of images or None; of a single prompt also one image. A text has the
            processor's image token where one goes; in a chat they take the places of its bare image parts, or stand
            before the first user message.

    Raises:
        ValueError: places and images differ in number, an image cannot be used, or the model takes none.
    """
    single = isinstance(prompts, str) or _is_message(prompts[0])
    asked = [prompts] if single else list(prompts)
    beside = [None] * len(asked) if pictures is None else [pictures] if single else list(pictures)
    if len(beside) != len(asked):
        raise ValueError(
            f"images must be given for each prompt: {len(asked)} prompts, images for {len(beside)}"
        )
    family = images.family(model.config)
    if family is None:
        if pictures is not None:
            raise ValueError(f"{model.config.model_type} takes no images")
        return [_text_ids(model.tokenizer, one) for one in asked], None
    if pictures is None and isinstance(asked[0], str):
        return [_text_ids(model.tokenizer, one) for one in asked], None
    encoder = ImageEncoder(
        model.processor, family, resize_policy("max", 0, False, model.config), np.dtype(model.dtype).name
    )
    read = [
        encoder.prompt(_document(one, own, i)) for i, (one, own) in enumerate(zip(asked, beside, strict=True))
    ]
    rows: list[images.Processed] = [one.row for one in read]
    return [one.ids.tolist() for one in read], rows if any(rows) else None


def refuse_placeholders(model: Any, prompts: Sequence[Any]) -> None:
    """Raises ValueError where a prompt (token ids) without images has a token that stands for one."""
    family = images.family(model.config)
    marks = [] if family is None else sorted(family.placeholder_ids)
    for number, ids in enumerate(prompts):
        if np.isin(ids, marks).any():
            raise ValueError(
                f"prompt {number} has a token that stands for an image and no image beside it; give the image, or what "
                "the processor made of it"
            )


def _document(prompt: Any, pictures: Any, number: int) -> Any:
    own = pictures if isinstance(pictures, (list, tuple)) or pictures is None else [pictures]
    if isinstance(prompt, str):
        return read_row({"text": prompt, "images": own}, number)
    options = {"add_generation_prompt": True}
    return read_row({"messages": prompt, "images": own, "chat_template_kwargs": options}, number)


def _text_ids(tokenizer: Any, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value


def beside(prompts: Sequence[Any]) -> tuple[list[str], list[Any] | None]:
    """vLLM's prompts, texts or {"prompt", "multi_modal_data": {"image"}}, as texts and the images of each.

    Raises:
        ValueError: another kind of data.
    """
    texts, pictures = [], []
    for one in prompts:
        text, data = (one, {}) if isinstance(one, str) else (one["prompt"], one.get("multi_modal_data") or {})
        if other := data.keys() - {"image"}:
            raise ValueError(f"multi_modal_data has {', '.join(sorted(other))}; only image is supported")
        texts.append(text)
        pictures.append(data.get("image"))
    return texts, pictures if any(picture is not None for picture in pictures) else None
