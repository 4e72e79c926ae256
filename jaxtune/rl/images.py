"""Prompts with images: they are documents of a VisionDataCollator, opened again for the generations that need them.

rows -> PromptImages.prepare (checked, tokens counted) -> begin, look (in the workers) -> rollout, ImageCollator
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from PIL import Image

from jaxtune.data import VisionDataCollator
from jaxtune.data.image_encoder import EncodedPrompt
from jaxtune.data.image_pool import default_workers
from jaxtune.data.image_rows import IMAGE_COLUMNS, image_column, naming, rows_with_images
from jaxtune.data.image_sources import open_stored, vision_rows
from jaxtune.data.images import open_image
from jaxtune.model import Model
from jaxtune.rl.config import GRPOConfig
from jaxtune.rl.data import Prompt, Prompts, is_conversational, within

KEPT = 4  # generations whose prompts are held: those that train, are scored, and come next


class PromptImages:
    """The images of a trainer's prompts.

    Args:
        model, processor: of text and images.
        args: template and batches.
    """

    def __init__(self, model: Model, processor: Any, args: GRPOConfig):
        self._args = args
        self._collator = VisionDataCollator(model, processor, formatting_func=self._as_document, resize="max")
        self.encoder = self._collator.encoder
        self.family = self.encoder.family
        self.names = list(self.family.sizes([{}]))
        self._workers = args.dataloader_num_workers or default_workers()
        rows = KEPT * args.generation_rows + 2 * args.per_device_eval_batch_size
        self._most = rows // min(args.group(train=train) for train in (True, False))
        self._begun: OrderedDict[int, Future[EncodedPrompt]] = OrderedDict()

    def concern(self, data: Any, tools: Sequence[Any]) -> bool:
        """Whether these rows are for a processor: some have images, or messages, which its template may want as parts.

        Raises:
            ValueError: images, and tools.
        """
        rows, _ = vision_rows(data)
        seen = next(rows_with_images(rows), None)
        if seen is not None and tools:
            raise ValueError(
                f"row {seen} has images, and tools do not go with images yet; leave such rows out, or write the turns "
                "in a rollout_func"
            )
        return seen is not None or (not tools and is_conversational(rows[0].get("prompt", "")))

    def _as_document(self, row: Any) -> Any:
        """A row in a format that the collator knows: its prompt up to the answer's beginning."""
        if "prompt" not in row:
            raise ValueError(
                f"GRPO needs a column 'prompt' (text, or a list of messages); the data has {', '.join(row)}"
            )
        beside = {name: row[name] for name in IMAGE_COLUMNS if row.get(name) is not None}
        if not is_conversational(row["prompt"]):
            return {"text": row["prompt"], **beside}
        options = {**(self._args.chat_template_kwargs or {}), "add_generation_prompt": True}
        return {"messages": row["prompt"], **beside, "chat_template_kwargs": options}

    def prepare(self, data: Any, *, limit: int, tokenise: bool) -> Prompts:
        """`data.prepare_prompts` of rows for a processor; every image is opened once.

        Raises:
            ValueError: rows or images that cannot be used.
        """
        workers, progress = self._args.dataloader_num_workers or None, not self._args.disable_tqdm
        prepared = self._collator.prepare(data, workers=workers, progress=progress)
        ids, documents = prepared["input_ids"][:], [number for (number,) in prepared["documents"]]
        kept = within(ids, self._args, limit)
        ids, documents = [ids[i] for i in kept], [documents[i] for i in kept]
        seen = any(self._collator.known(number).sizes for number in documents)
        rows, tokens = ImageRows(self, documents), ids if tokenise else None
        return Prompts(rows, tokens, documents, self) if seen else Prompts(rows, tokens)

    def begin(self, documents: Iterable[int]) -> None:
        """Has the workers open and process these prompts' images, for `look`."""
        pool = self._collator.pool(self._workers)
        for number in documents:
            if number not in self._begun or self._begun[number].cancelled():  # by another number of workers
                self._begun[number] = pool.prompt(self._collator.document(number))
            self._begun.move_to_end(number)
        while len(self._begun) > self._most:
            self._begun.popitem(last=False)

    def look(self, number: int) -> EncodedPrompt:
        """A prompt with its images; it waits for what was not begun before.

        Raises:
            ValueError: an image is gone, or not the one that was checked.
        """
        self.begin([number])
        found = self._begun[number].result()
        if found.digest != self._collator.known(number).digest:
            row = self._collator.document(number).number
            raise ValueError(f"row {row}: an image has changed since the data was checked")
        return found

    def row(self, number: int) -> dict[str, Any]:
        """A row of the dataset; its prompt's image parts hold PIL images, and so do columns that store images."""
        row, pictures = self._collator.row(number), self.look(number).pictures
        document = self._collator.document(number)
        prompt = _with_images(document.prompt, pictures)
        others = {name: value for name, value in row.items() if name not in ("prompt", *IMAGE_COLUMNS)}
        with naming(document.number):
            others = open_stored(others, self._collator.folder(number), self.encoder.cache)
        column = image_column(row)
        beside = [] if column is None else _listed(row[column])
        known = {column: pictures} if len(beside) == len(pictures) else {}  # else some stand in the messages
        seen = {name: _opened(row[name], known.get(name)) for name in IMAGE_COLUMNS if name in row}
        return {**row, **others, "prompt": prompt, **seen}

    def row_without_images(self, number: int) -> dict[str, Any]:
        """A row without its columns of images, and bare parts in their place in its prompt."""
        row = {**self._collator.row(number), "prompt": self._collator.document(number).prompt}
        return {name: value for name, value in row.items() if name not in IMAGE_COLUMNS}

    def sizes(self, documents: Sequence[int] | np.ndarray) -> np.ndarray:
        """int64 [documents, lengths]: what the images of each add to each of the family's lengths."""
        found = [self._collator.known(int(number)).sizes for number in documents]
        table = [[sizes.get(name, 0) for name in self.names] for sizes in found]
        return np.asarray(table, np.int64).reshape(-1, len(self.names))

    def digest(self, documents: Sequence[int]) -> str:
        """Changes with any pixel."""
        return self._collator.image_digest(documents)

    def close(self) -> None:
        """Ends the workers; they start again when they are needed."""
        self._begun.clear()
        self._collator.close()


class ImageRows(Sequence[dict[str, Any]]):
    """Rows of a dataset, by the numbers of their documents; see PromptImages.row."""

    def __init__(self, images: PromptImages, documents: Sequence[int]):
        self._images, self._documents = images, documents

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return ImageRows(self._images, self._documents[index])
        return self._images.row(self._documents[index])

    def without_images(self) -> Iterator[dict[str, Any]]:
        """All rows without their images."""
        return map(self._images.row_without_images, self._documents)


def _with_images(prompt: Prompt, pictures: Sequence[Image.Image]) -> Prompt:
    """A prompt whose image parts hold PIL images; a text as it is."""
    if isinstance(prompt, str):
        return prompt
    left = iter(pictures)

    def filled(part: dict[str, Any]) -> dict[str, Any]:
        return {**part, "image": next(left)} if part["type"] == "image" else part

    return [
        {**message, "content": [filled(part) for part in message["content"]]}
        if "content" in message
        else message
        for message in prompt
    ]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _opened(value: Any, pictures: Sequence[Image.Image] | None) -> Any:
    """Images as `datasets` stores them, opened; they are these pictures, if there are any. Else the value as it is."""
    opened = [
        one if not isinstance(one, dict) else open_image(one) if pictures is None else pictures[i]
        for i, one in enumerate(_listed(value))
    ]
    return opened if isinstance(value, list) else opened[0]
