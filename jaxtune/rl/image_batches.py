"""Batches of experience whose prompts have images: image_slots, images, and rope_positions where the family has them.

What a model wrote is text, whatever token it is: only a prompt's image tokens stand for images. Each device has its
rows' images to itself, as in SFT: those of the first come first, padded to the same lengths as those of the next, and
slots count from each device's first.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtune.data.shapes import Shape, choose_shapes, round_up
from jaxtune.images import image_slots
from jaxtune.rl.config import GRPOConfig
from jaxtune.rl.data import Plan, Prompts
from jaxtune.rl.experience import BLANK, Arrays, Collator, Experience
from jaxtune.rl.groups import GroupCollator
from jaxtune.rl.images import PromptImages

SHAPES = 2  # of images, beside one that holds any; each is a compilation for each length of rows
STEPS = 64  # that shapes are chosen from


class ImageCollator:
    """A collator whose batches have their prompts' images.

    Args:
        text: lays out the tokens. images: the trainer's.
        shapes: lengths of a device's arrays of images to begin with, cheapest first, the last the largest; what none
            of them holds becomes one more.
        devices: of all processes, among which the rows of a micro-batch are divided.
        part: this process, of how many; the images of the others' devices are left empty.
    """

    def __init__(
        self,
        text: Collator | GroupCollator,
        images: PromptImages,
        shapes: Callable[[], list[Shape]],
        devices: int = 1,
        part: tuple[int, int] = (0, 1),
    ):
        self._text, self._images, self._shapes_of, self._devices = text, images, shapes, devices
        self._own = range(devices * part[0] // part[1], devices * (part[0] + 1) // part[1])
        self._rotates = images.family.rope_positions(np.zeros(1, np.int32), None) is not None

    @cached_property
    def shapes(self) -> list[Shape]:
        """Those in use."""
        return self._shapes_of()

    def __call__(self, parts: Sequence[tuple[Experience, Sequence[int]]], height: int) -> Arrays:
        """The text's arrays, with R rows of input_ids a micro-batch; where the data has images also image_slots int32
        [A, R, T], rope_positions int32 [A, R, T, 3] where the family has them, and images, the family's arrays
        [A, devices · …].

        Raises:
            ValueError: as the text's.
        """
        batch: dict[str, Any] = self._text(parts, height)
        if parts[0][0].documents is None:
            return batch
        each = batch["input_ids"].shape[1] // self._devices
        copies = height // batch["input_ids"].shape[1]  # of a prompt that stands once
        shares = [  # [A][devices][at most `each`]
            [
                _Share(source, numbers[d * each * copies : (d + 1) * each * copies : copies])
                for d in range(self._devices)
            ]
            for source, numbers in parts
        ]
        self._images.begin(number for micro in shares for d in self._own for number in micro[d].documents)
        shape = self._shape([share for micro in shares for share in micro])
        made = [
            self._micro({name: x[a] for name, x in batch.items()}, micro, each, shape)
            for a, micro in enumerate(shares)
        ]
        return {**batch, **jax.tree.map(lambda *one: np.stack(one), *made)}

    def unpad(self, values: np.ndarray, experience: Experience, numbers: Sequence[int]) -> list[np.ndarray]:
        """As the text's."""
        return self._text.unpad(values, experience, numbers)

    def _shape(self, shares: Sequence["_Share"]) -> Shape:
        """That of a batch; the largest for one that stands for any."""
        if shares[0].is_blank:
            return self.shapes[-1]
        need = _at_least(
            self._images, np.stack([self._images.sizes(s.documents).sum(0) for s in shares]).max(0)
        )
        for shape in self.shapes:
            if all(shape[name] >= length for name, length in need.items()):
                return shape
        self.shapes.append(_rounded(need))
        return self.shapes[-1]

    def _micro(self, batch: Arrays, shares: Sequence["_Share"], each: int, shape: Shape) -> dict[str, Any]:
        """What one micro-batch [R, T] gets, of which every device has `each` rows."""
        family, ids, positions = self._images.family, batch["input_ids"], batch["positions"]
        lengths = np.zeros(len(ids), np.int64)
        for d, share in enumerate(shares):
            lengths[d * each : d * each + len(share.numbers)] = share.lengths
        prompt = (batch["segment_ids"] != 0) & (positions < lengths[:, None])
        marked = np.split(np.where(prompt, ids, -1), self._devices)
        slots = [image_slots(part, family.image_token_id) for part in marked]
        arrays: Arrays = {"image_slots": np.concatenate(slots)}
        rows = {d: [self._images.look(number).row for number in shares[d].documents] for d in self._own}
        if self._rotates:
            arrays["rope_positions"] = np.repeat(positions[..., None], 3, -1)
            for number, row in ((d * each + k, row) for d in self._own for k, row in enumerate(rows[d])):
                own = family.rope_positions(ids[number][prompt[number]], row)
                _place_rope(arrays["rope_positions"][number], prompt[number], own)
        packed = {d: self._images.encoder.packed(rows[d], shape) for d in self._own}
        empty = jax.tree.map(np.zeros_like, packed[self._own[0]])
        found = [packed.get(d, empty) for d in range(self._devices)]
        return arrays | {"images": jax.tree.map(lambda *one: np.concatenate(one), *found)}


def _place_rope(positions: np.ndarray, prompt: np.ndarray, own: np.ndarray | None) -> None:
    """Puts a prompt's rotary positions [P, 3] where it stands among those of a row [T, 3]; what follows goes on behind
    its images."""
    assert own is not None, "the family has them"
    positions += own.max(initial=-1) + 1 - len(own)
    positions[prompt] = own


class _Share(NamedTuple):
    """What a device has of a micro-batch: rows of experience, one for each prompt that stands there."""

    source: Experience
    numbers: Sequence[int]

    @property
    def is_blank(self) -> bool:
        """Whether the rows stand for those of the largest images."""
        assert self.source.documents is not None, "all parts have images, or none has"
        return self.source.documents[0] == BLANK

    @property
    def documents(self) -> list[int]:
        """Of its rows; none of those that are blank."""
        assert self.source.documents is not None
        return [] if self.is_blank else self.source.documents[list(self.numbers)].tolist()

    @property
    def lengths(self) -> list[int]:
        """Tokens of its prompts."""
        return [len(self.source.prompt_ids[i]) for i in self.numbers]


Collators = Collator | GroupCollator | ImageCollator


def with_images(text: Collator | GroupCollator, images: PromptImages | None, *how: Any) -> Collators:
    """The collator of a model: `text` for one of text; `how`: as of ImageCollator."""
    return text if images is None else ImageCollator(text, images, *how)


def planned_shapes(prompts: Prompts, plan: Plan, args: GRPOConfig, devices: int) -> list[Shape]:
    """Shapes that hold each device's part of the first micro-batches of a run with little padding, and one that holds
    any."""
    assert prompts.images is not None and prompts.documents is not None, "no image is in the data"
    images, height = prompts.images, args.per_device_train_batch_size
    copies = plan.group if args.shared_prefix else 1  # rows that share a prompt that stands once
    sizes, needs = images.sizes(prompts.documents), []
    for step in range(min(plan.steps_per_epoch, STEPS)):
        shares = []
        for micro in plan.micros(step):
            rows = plan.prompts(micro.generation).repeat(plan.group)[plan.row_order(micro.generation)]
            own = sizes[rows[micro.part * height : (micro.part + 1) * height : copies]]
            shares.append(own.reshape(devices, -1, own.shape[-1]).sum(1).max(0))
        needs.append(np.max(shares, 0))
    most = _most(images, sizes, height // copies // devices, plan.group // copies)
    least = np.asarray(list(images.family.sizes([{}]).values()))
    table = dict(zip(images.names, np.maximum(needs, least).T, strict=True))
    return choose_shapes(table, most, {images.names[0]: 1.0}, SHAPES)


def largest_shapes(evaluations: Iterable[Prompts], args: GRPOConfig, devices: int) -> list[Shape]:
    """The shape that holds a device's part of any batch of each evaluation with images."""
    rows, group = args.per_device_eval_batch_size // devices, args.group(train=False)
    shapes = []
    for prompts in evaluations:
        if prompts.images is not None and prompts.documents is not None:
            images = prompts.images
            shapes.append(_rounded(_most(images, images.sizes(prompts.documents), rows, group)))
    return shapes


def _most(images: PromptImages, sizes: np.ndarray, rows: int, group: int) -> Shape:
    """What so many rows can need, of which `group` have the same prompt."""
    return _at_least(images, np.sort(sizes, 0)[::-1].repeat(group, 0)[:rows].sum(0))


def _at_least(images: PromptImages, sizes: np.ndarray) -> Shape:
    """Lengths int [lengths] by name, none below what no image needs."""
    least = images.family.sizes([{}])
    return {name: max(int(size), least[name]) for name, size in zip(images.names, sizes, strict=True)}


def _rounded(shape: Shape) -> Shape:
    return {name: int(round_up(np.asarray(length))) for name, length in shape.items()}
