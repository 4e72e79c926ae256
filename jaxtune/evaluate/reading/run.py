"""Images with texts to what a model reads there."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from jaxtune.data.image_rows import Document, Messages
from jaxtune.data.image_sources import reading_row, row_document, vision_rows
from jaxtune.data.images import ImageError
from jaxtune.data.vision import VisionDataCollator
from jaxtune.model import Model


@dataclasses.dataclass(frozen=True)
class Example:
    """What a model is asked, and what stands there.

    document: the conversation up to the answer, with its images. reference: the answer.
    """

    document: Document
    reference: str


def examples(
    rows: Any, instruction: str | None = None, *, limit: int | None = None, image_folder: Path | None = None
) -> list[Example]:
    """Rows with images as questions with answers.

    Args:
        rows: any format of `data.image_rows` that ends with an answer of the assistant; or, with an instruction, rows
            of an image and a text, which is asked for with it. A file, a hub name, a dataset or a list.
        limit: the first so many rows only.
        image_folder: where relative paths are looked for besides the current folder; None: beside a local file.

    Raises:
        ImageError: a row without images, or without an answer; names it.
    """
    table, folder = vision_rows(rows)
    collected = []
    for number in range(len(table) if limit is None else min(limit, len(table))):
        row = table[number] if instruction is None else reading_row(table[number], instruction, number)
        collected.append(_example(row, number, image_folder or folder))
    return collected


def _example(row: Any, number: int, folder: Path | None) -> Example:
    document = row_document(row, number, folder)
    if not document.images:
        raise ImageError(f"row {number} has no image to read; leave the row out, or give it one")
    asked, answer = document.prompt, document.completion
    if isinstance(asked, list) and answer is None and asked[-1]["role"] == "assistant":
        asked, answer = asked[:-1], asked[-1:]
    text = answer if isinstance(answer, str) else "".join(_texts(answer or []))
    if not text.strip():
        raise ImageError(
            f"row {number} does not end with an assistant's answer, which is what a reading is compared with; rows of "
            "an image and a text need an instruction"
        )
    options = (
        dict(document.options)
        if isinstance(asked, str)
        else {**document.options, "add_generation_prompt": True}
    )
    return Example(dataclasses.replace(document, prompt=asked, completion=None, options=options), text)


def _texts(messages: Messages) -> list[str]:
    return [part.get("text", "") for message in messages for part in message.get("content", ())]


def read_images(
    model: Model,
    processor: Any,
    asked: Sequence[Example],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    resize: Any = "min",
    progress: bool = True,
) -> list[str]:
    """What the model writes, greedily, to each example; every image is opened once before the first.

    Args:
        batch_size: images are processed and answered so many rows at a time.
        resize: as in training, see `data.resize.resize_policy`.

    Raises:
        ImageError: images that cannot be used; names the rows.
    """
    collator = VisionDataCollator(model, processor, resize=resize)
    collator.check([one.document for one in asked], progress=progress)
    said: list[str] = []
    order = range(0, len(asked), batch_size)
    for first in tqdm(order, desc="Reading", unit="batch", disable=None if progress else True):
        documents = [one.document for one in asked[first : first + batch_size]]
        batch = collator.encoder.processed(documents, padding=True, padding_side="left", return_tensors="np")
        ids = np.asarray(model.generate(**batch, max_new_tokens=max_new_tokens))
        answers = ids[:, np.asarray(batch["input_ids"]).shape[1] :]
        said += [processor.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
    return said
