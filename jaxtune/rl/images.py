"""Prompts with images: they are documents of a VisionDataCollator, opened again for the generations that need them.

    rows -> PromptImages.prepare (checked, tokens counted) -> look (the processor's arrays) -> rollout, ImageCollator

A batch carries images as one of SFT does: image_slots, images, and rope_positions where the family has them. What a
model wrote is text, whatever token it is: only a prompt's image tokens stand for images.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any

import jax
import numpy as np

from jaxtune.data import VisionDataCollator, has_images
from jaxtune.data.image_rows import IMAGE_COLUMNS, Document
from jaxtune.data.image_sources import vision_rows
from jaxtune.data.images import open_image
from jaxtune.data.shapes import Shape, choose_shapes, round_up
from jaxtune.images import Processed, image_slots
from jaxtune.model import Model
from jaxtune.rl.config import GRPOConfig
from jaxtune.rl.data import Plan, Prompt, Prompts, is_conversational, within
from jaxtune.rl.experience import BLANK, Arrays, Collator, Experience
from jaxtune.rl.groups import GroupCollator

SHAPES = 2  # of images, beside one that holds any; each is a compilation for each length of rows
STEPS = 64  # that shapes are chosen from


@dataclasses.dataclass(frozen=True)
class Looked:
    """A prompt with its images in it, as reward functions and a rollout_func get it.

    row: what the processor gave of them.
    """

    prompt: Prompt
    row: Processed


class PromptImages:
    """The images of a trainer's prompts.

    Args:
        model, processor: of text and images.
        args: template and batches.
    """

    def __init__(self, model: Model, processor: Any, args: GRPOConfig):
        self._model, self._args = model, args
        self._collator = VisionDataCollator(model, processor, formatting_func=self._as_document, resize="max")
        self.encoder = self._collator.encoder
        self.family = self.encoder.family
        self.names = list(self.family.sizes([{}]))
        recent = 3 * args.generation_rows // args.num_generations + args.per_device_eval_batch_size
        self.look: Callable[[int], Looked] = lru_cache(recent)(self._look)

    def concern(self, data: Any, tools: Sequence[Any]) -> bool:
        """Whether these rows are for a processor: they have images, or messages, which its template may want as parts.

        Raises:
            ValueError: images, and tools.
        """
        first = vision_rows(data)[0][0]
        if has_images(first) and tools:
            raise ValueError(
                "GRPOTrainer: tools do not go with images yet; write the turns in a rollout_func"
            )
        return has_images(first) or (not tools and is_conversational(first.get("prompt", "")))

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
            ValueError: rows or images that cannot be used, or a setting that does not go with images.
        """
        prepared = self._collator.prepare(data, progress=not self._args.disable_tqdm)
        ids, documents = prepared["input_ids"][:], [number for (number,) in prepared["documents"]]
        kept = within(ids, self._args, limit)
        ids, documents = [ids[i] for i in kept], [documents[i] for i in kept]
        rows, tokens = ImageRows(self._collator, documents), ids if tokenise else None
        if not any(self._collator.known(number).sizes for number in documents):
            return Prompts(rows, tokens)
        self._check_settings()
        return Prompts(rows, tokens, documents, self)

    def _check_settings(self) -> None:
        if self._args.use_vllm:
            raise ValueError(
                "use_vllm=True sends no images to vLLM; leave it out: the embedded engine sees them"
            )
        if self._model.layout.size > 1:
            raise ValueError(
                f"GRPOTrainer: rows with images train on one device, the model is on {self._model.layout.size}; load "
                "it with devices=1"
            )

    def _look(self, number: int) -> Looked:
        document = self._collator.document(number)
        ids, row = self.encoder.prompt(document)
        if len(ids) != self._collator.known(number).length:
            raise ValueError(
                f"row {document.number}: an image has changed its size since the data was checked"
            )
        return Looked(_with_images(document), row)

    def sizes(self, documents: Sequence[int]) -> np.ndarray:
        """int64 [documents, lengths]: what the images of each add to each of the family's lengths."""
        found = [self._collator.known(number).sizes for number in documents]
        return np.asarray([[sizes.get(name, 0) for name in self.names] for sizes in found], np.int64)

    def digest(self, documents: Sequence[int]) -> str:
        """Changes with any pixel."""
        return self._collator.image_digest(documents)


class ImageRows(Sequence[dict[str, Any]]):
    """Rows of a dataset by the numbers that a collator knows them by.

    Their prompts are without the images themselves; columns of images hold PIL images where the dataset stores them.
    """

    def __init__(self, collator: VisionDataCollator, documents: Sequence[int]):
        self._collator, self._documents = collator, documents

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return ImageRows(self._collator, self._documents[index])
        row = self._collator.row(self._documents[index])
        seen = {name: _opened(row[name]) for name in IMAGE_COLUMNS if name in row}
        return self._without_images(self._documents[index]) | seen

    def without_images(self) -> Iterator[dict[str, Any]]:
        """All rows without their columns of images."""
        return map(self._without_images, self._documents)

    def _without_images(self, number: int) -> dict[str, Any]:
        row = {**self._collator.row(number), "prompt": self._collator.document(number).prompt}
        return {name: value for name, value in row.items() if name not in IMAGE_COLUMNS}


class ImageCollator:
    """A collator whose batches have their prompts' images.

    Args:
        text: lays out the tokens. images: the trainer's.
        shapes: lengths of the images' arrays to begin with, cheapest first, the last the largest; what none of them
            holds becomes one more.
    """

    def __init__(
        self, text: Collator | GroupCollator, images: PromptImages, shapes: Callable[[], list[Shape]]
    ):
        self._text, self._images, self._shapes_of = text, images, shapes

    @cached_property
    def shapes(self) -> list[Shape]:
        """Those in use."""
        return self._shapes_of()

    def __call__(self, parts: Sequence[tuple[Experience, Sequence[int]]], height: int) -> Arrays:
        """The text's arrays, with R rows of input_ids a micro-batch; where the data has images also image_slots int32
        [A, R, T], rope_positions int32 [A, R, T, 3] where the family has them, and images, the family's arrays [A, …].

        Raises:
            ValueError: as the text's.
        """
        batch: dict[str, Any] = self._text(parts, height)
        if parts[0][0].documents is None:
            return batch
        copies = height // batch["input_ids"].shape[1]  # of a prompt that stands once
        firsts = [[(source, i) for i in numbers[::copies]] for source, numbers in parts]
        rows = [[self._row(source, i) for source, i in micro] for micro in firsts]
        lengths = [[len(source.prompt_ids[i]) for source, i in micro] for micro in firsts]
        shape = self._shape(rows, blank=parts[0][0].documents[0] == BLANK)
        made = [self._micro(batch, a, rows[a], lengths[a], shape) for a in range(len(parts))]
        return {**batch, **jax.tree.map(lambda *one: np.stack(one), *made)}

    def unpad(self, values: np.ndarray, experience: Experience, numbers: Sequence[int]) -> list[np.ndarray]:
        """As the text's."""
        return self._text.unpad(values, experience, numbers)

    def _row(self, source: Experience, i: int) -> Processed:
        assert source.documents is not None, "all parts have images, or none has"
        number = int(source.documents[i])
        return {} if number == BLANK else self._images.look(number).row

    def _shape(self, rows: Sequence[Sequence[Processed]], *, blank: bool) -> Shape:
        """That of a batch; the largest for one that stands for any."""
        if blank:
            return self.shapes[-1]
        needs = [self._images.family.sizes(micro) for micro in rows]
        need = {name: max(sizes[name] for sizes in needs) for name in self._images.names}
        for shape in self.shapes:
            if all(shape[name] >= length for name, length in need.items()):
                return shape
        self.shapes.append(_rounded(need))
        return self.shapes[-1]

    def _micro(
        self, batch: Arrays, a: int, rows: Sequence[Processed], lengths: Sequence[int], shape: Shape
    ) -> dict[str, Any]:
        family = self._images.family
        ids, positions = batch["input_ids"][a], batch["positions"][a]
        ends = np.pad(np.asarray(lengths, np.int64), (0, len(ids) - len(lengths)))
        prompt = (batch["segment_ids"][a] != 0) & (positions < ends[:, None])
        arrays: Arrays = {"image_slots": image_slots(np.where(prompt, ids, -1), family.image_token_id)}
        for number, row in enumerate(rows):
            own = family.rope_positions(ids[number][prompt[number]], row)
            if own is None:
                break
            rope = arrays.setdefault("rope_positions", np.repeat(positions[..., None], 3, -1))
            rope[number] += (
                own.max(initial=-1) + 1 - lengths[number]
            )  # what follows goes on behind the images
            rope[number, prompt[number]] = own
        return arrays | {"images": self._images.encoder.packed(rows, shape)}


Collators = Collator | GroupCollator | ImageCollator


def with_images(
    text: Collator | GroupCollator, images: PromptImages | None, shapes: Callable[[], list[Shape]]
) -> Collators:
    """The collator of a model: `text` for one of text."""
    return text if images is None else ImageCollator(text, images, shapes)


def planned_shapes(prompts: Prompts, plan: Plan, args: GRPOConfig) -> list[Shape]:
    """Shapes that hold the first micro-batches of a run with little padding, and one that holds any."""
    assert prompts.images is not None and prompts.documents is not None, "no image is in the data"
    images, height = prompts.images, args.per_device_train_batch_size
    copies = plan.group if args.shared_prefix else 1  # rows that share a prompt that stands once
    sizes, needs = images.sizes(prompts.documents), []
    for step in range(min(plan.steps_per_epoch, STEPS)):
        micros = []
        for micro in plan.micros(step):
            rows = plan.prompts(micro.generation).repeat(plan.group)[plan.row_order(micro.generation)]
            micros.append(sizes[rows[micro.part * height : (micro.part + 1) * height : copies]].sum(0))
        needs.append(np.max(micros, 0))
    most = _most(images, sizes, height // copies, plan.group // copies)
    least = np.asarray(list(images.family.sizes([{}]).values()))
    table = dict(zip(images.names, np.maximum(needs, least).T, strict=True))
    return choose_shapes(table, most, {images.names[0]: 1.0}, SHAPES)


def largest_shapes(evaluations: Iterable[Prompts], args: GRPOConfig) -> list[Shape]:
    """The shape that holds any batch of each evaluation with images."""
    rows, group = args.per_device_eval_batch_size, args.group(train=False)
    shapes = []
    for prompts in evaluations:
        if prompts.images is not None and prompts.documents is not None:
            images = prompts.images
            shapes.append(_rounded(_most(images, images.sizes(prompts.documents), rows, group)))
    return shapes


def _most(images: PromptImages, sizes: np.ndarray, rows: int, group: int) -> Shape:
    largest = np.sort(sizes, 0)[::-1].repeat(group, 0)[:rows].sum(0)
    least = images.family.sizes([{}])
    return {name: max(int(size), least[name]) for name, size in zip(images.names, largest, strict=True)}


def _rounded(shape: Shape) -> Shape:
    return {name: int(round_up(np.asarray(length))) for name, length in shape.items()}


def _with_images(document: Document) -> Prompt:
    """A prompt whose image parts hold PIL images; a text as it is."""
    if isinstance(document.prompt, str):
        return document.prompt
    pictures = iter(document.images)

    def filled(part: dict[str, Any]) -> dict[str, Any]:
        return {**part, "image": open_image(next(pictures))} if part["type"] == "image" else part

    return [
        {**message, "content": [filled(part) for part in message["content"]]}
        if "content" in message
        else message
        for message in document.prompt
    ]


def _opened(value: Any) -> Any:
    """Images as `datasets` stores them, opened; anything else as it is."""
    if isinstance(value, list):
        return [_opened(one) for one in value]
    return open_image(value) if isinstance(value, dict) else value
