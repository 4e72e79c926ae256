"""Which prompts a generation is made for, and which of its completions an optimizer step trains on."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import numpy as np
from PIL import Image

from jaxtune.data import load_dataset
from jaxtune.data.image_rows import rows_with_images
from jaxtune.data.image_sources import plain_images
from jaxtune.data.long_rows import leave_out
from jaxtune.rl.config import GRPOConfig

if TYPE_CHECKING:
    from jaxtune.data.image_encoder import EncodedPrompt
    from jaxtune.rl.images import ImageRows, PromptImages

Prompt = str | list[dict[str, Any]]  # text, or messages
NO_PROMPT: Prompt = [{"role": "user", "content": ""}]  # where an environment says what is asked


def is_conversational(prompt: Prompt) -> bool:
    """Whether a prompt is a list of messages."""
    return not isinstance(prompt, str)


class Micro(NamedTuple):
    """A micro-batch: slice `part` of generation number `generation`. `is_first`: that generation starts here."""

    generation: int
    part: int
    is_first: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """The order of TRL's RepeatSampler, every part of it a function of (seed, step).

    A generation takes `unique` prompts, each `group` times; its rows are shuffled, cut into `parts` micro-batches, and
    gone through `iterations` times. An optimizer step takes the next `accumulation` micro-batches of the epoch.
    Prompts that fill no whole generation are left out of the epoch.

    num_prompts: prompts of the data. unique: of one generation. whole_groups: a prompt's rows stay together.
    """

    num_prompts: int
    unique: int
    group: int
    parts: int
    iterations: int
    accumulation: int
    seed: int
    shuffle: bool
    whole_groups: bool = False

    def __post_init__(self) -> None:
        if self.num_prompts < self.unique:
            raise ValueError(
                f"the training data has {self.num_prompts} prompts and one generation takes {self.unique} "
                f"({self.unique * self.group} completions, {self.group} of each prompt); give more data or make "
                "per_device_train_batch_size, gradient_accumulation_steps or steps_per_generation smaller"
            )

    @property
    def generations_per_epoch(self) -> int:
        return self.num_prompts // self.unique

    @property
    def micros_per_epoch(self) -> int:
        return self.generations_per_epoch * self.parts * self.iterations

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may be short."""
        return -(-self.micros_per_epoch // self.accumulation)

    def micros(self, step: int) -> list[Micro]:
        """The micro-batches of an optimizer step, counted from 0 over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self.accumulation
        out = []
        for number in range(first, min(first + self.accumulation, self.micros_per_epoch)):
            generation, inside = divmod(number, self.parts * self.iterations)
            generation += epoch * self.generations_per_epoch
            out.append(Micro(generation, inside % self.parts, inside == 0))
        return out

    def prompts(self, generation: int) -> np.ndarray:
        """Which prompts, int64 [unique]."""
        epoch, within = divmod(generation, self.generations_per_epoch)
        order = np.arange(self.num_prompts)
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.num_prompts)
        return order[within * self.unique : (within + 1) * self.unique]

    def other_prompts(self, generation: int, attempt: int, count: int) -> np.ndarray:
        """Prompts to take in place of those without variance, int64 [count]: any but those of the generation."""
        others = np.setdiff1d(np.arange(self.num_prompts), self.prompts(generation))
        pool = others if len(others) else np.arange(self.num_prompts)
        return self.random(generation, attempt).choice(pool, count, replace=len(pool) < count)

    def row_order(self, generation: int) -> np.ndarray:
        """The shuffle of a generation's rows, int64 [unique * group]."""
        if not self.whole_groups:
            return self.random(generation, 0).permutation(self.unique * self.group)
        first = self.random(generation, 0).permutation(self.unique) * self.group
        return (first[:, None] + np.arange(self.group)).reshape(-1)

    def random(self, generation: int, stream: int) -> np.random.Generator:
        """Numbers that depend on the generation and the stream alone."""
        return np.random.default_rng([self.seed, 1 + generation, stream])


def make_plan(args: GRPOConfig, num_prompts: int) -> Plan:
    """The plan of a run."""
    return Plan(
        num_prompts=num_prompts,
        unique=args.generation_rows // args.num_generations,
        group=args.num_generations,
        parts=args.generation_steps,
        iterations=args.num_iterations,
        accumulation=args.gradient_accumulation_steps,
        seed=args.seed if args.data_seed is None else args.data_seed,
        shuffle=args.shuffle_dataset,
        whole_groups=args.shared_prefix,
    )


@dataclasses.dataclass
class GRPOBatches:
    """The batches of a plan; making one may make completions."""

    plan: Plan
    make: Callable[[int], dict[str, np.ndarray]]

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch

    def step(self, number: int) -> dict[str, np.ndarray]:
        return self.make(number)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Rows of a dataset with their prompts' tokens.

    rows: with a column "prompt". ids: of each row; None where the rollout makes them. documents: the number of each
    row in `images`; None where no row has images.
    """

    rows: "datasets.Dataset | ImageRows"
    ids: list[list[int]] | None
    documents: list[int] | None = None
    images: "PromptImages | None" = None

    def __len__(self) -> int:
        return len(self.rows)

    def begin(self, numbers: Iterable[int]) -> None:
        """Has the images of some rows opened, if there are any; `seen` and `rows` then wait less for them."""
        if self.images is not None and self.documents is not None:
            self.images.begin(self.documents[number] for number in numbers)

    def seen(self, numbers: Iterable[int]) -> "list[EncodedPrompt] | None":
        """The prompts of some rows with their images; None where no row has any."""
        if self.images is None or self.documents is None:
            return None
        return [self.images.look(self.documents[number]) for number in numbers]

    def longest(self) -> int:
        """Tokens of the longest prompt, 0 where they are not known."""
        return max(map(len, self.ids)) if self.ids else 0

    def digest(self) -> str:
        """Changes with any value of any row, with any token of its prompt and any pixel of its images."""
        digest = hashlib.blake2b(digest_size=32)
        rows = self.rows if isinstance(self.rows, datasets.Dataset) else self.rows.without_images()
        if self.images is not None and self.documents is not None:
            digest.update(self.images.digest(self.documents).encode())
        for i, row in enumerate(rows):
            ids = None if self.ids is None else self.ids[i]
            digest.update(json.dumps([row, ids], sort_keys=True, default=_said).encode())
        return digest.hexdigest()


def _said(value: Any) -> Any:
    """What JSON has no form for: of an image its pixels, since its repr names an address."""
    return [value.mode, value.size, value.tobytes().hex()] if isinstance(value, Image.Image) else repr(value)


def prepare_prompts(
    data: Any,
    tokenizer: Any,
    args: GRPOConfig,
    *,
    limit: int,
    tokenise: bool = True,
    needs_prompt: bool = True,
    tools: Sequence[Any] = (),
) -> Prompts:
    """Load rows, and make their prompts' tokens as TRL does.

    Args:
        data: what load_dataset takes; a column "prompt" of text or messages, and any others for the rewards.
        limit: most tokens that prompt and completion may have together.
        tokenise: False: a rollout_func or an environment does it.
        needs_prompt: False: there may be no such column.
        tools: functions that the chat template tells the model of.

    Raises:
        ValueError: no such column, or prompts that are too long (see within).
    """
    rows = load_dataset(data)
    if needs_prompt and "prompt" not in rows.column_names:
        raise ValueError(
            f"GRPO needs a column 'prompt' (text, or a list of messages); the data has {', '.join(rows.column_names)}"
        )
    seen = [*rows_with_images(plain_images(rows))]
    if seen:
        raise ValueError(
            f"{len(seen)} of {len(rows)} rows have images (the first is row {seen[0]}), and the model takes none; load "
            "one with FastVisionModel, or leave these rows out"
        )
    if not tokenise:
        return Prompts(rows, None)
    template = (args.chat_template_kwargs or {}) | ({"tools": list(tools)} if tools else {})
    ids = prompt_ids(rows["prompt"], tokenizer, template)
    kept = within(ids, args, limit)
    return Prompts(rows, ids) if len(kept) == len(ids) else Prompts(rows.select(kept), [ids[i] for i in kept])


def within(ids: Sequence[Sequence[int]], args: GRPOConfig, limit: int) -> list[int]:
    """Numbers of the prompts that are neither empty nor too long, by their tokens; tells which the others are.

    Raises:
        ValueError: there are none, or others and they are to be refused (too_long).
    """
    room = limit - args.max_completion_length
    if room < 1:
        raise ValueError(
            f"max_completion_length={args.max_completion_length} leaves no room for a prompt in the {limit} tokens "
            "that the model was loaded for; give from_pretrained a larger max_seq_length"
        )
    allowed = min(room, args.max_prompt_length or room)
    if allowed < room:
        rule, advice = f"max_prompt_length={allowed}", "Raise max_prompt_length"
    else:
        rule = (
            f"{room} tokens (max_seq_length={limit} less max_completion_length={args.max_completion_length})"
        )
        advice = "Give from_pretrained a larger max_seq_length, or make max_completion_length smaller"
    lengths = np.asarray([len(one) for one in ids])
    fits = (lengths > 0) & (lengths <= allowed)
    fault, advice = f"prompts are empty or longer than {rule}", f"prompts are not cut. {advice}"
    leave_out(fits, lengths, fault, advice, args.too_long)
    return np.flatnonzero(fits).tolist()


def prompt_ids(prompts: Sequence[Prompt], tokenizer: Any, template_kwargs: dict[str, Any]) -> list[list[int]]:
    """Tokens of prompts: through the chat template with the answer's beginning, or as the tokenizer takes text."""
    prompts = list(prompts)
    if not is_conversational(prompts[0]):
        if "tools" in template_kwargs:
            raise ValueError(
                "tools need prompts of messages, [{'role': 'user', 'content': …}]; the data has text"
            )
        return tokenizer(text=prompts)["input_ids"]
    made = tokenizer.apply_chat_template(
        conversation=prompts, add_generation_prompt=True, tokenize=True, return_dict=True, **template_kwargs
    )
    return made["input_ids"]
