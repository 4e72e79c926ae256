"""Completions with all that training needs of them, and their way into arrays of static shape."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.data import buckets
from jaxtune.rl.data import Prompt

Arrays = dict[str, np.ndarray]

# Values of a completion's tokens that a step may need, float32.
PER_TOKEN = ("mask", "old_log_probs", "ref_log_probs", "sampling_log_probs")


@dataclasses.dataclass
class Sample:
    """One completion, as it was made and rewarded.

    row: the dataset's columns. completion: text or messages. log_probs: the sampler's, or None. own: 1 where the model
    wrote the token. ended: whether it has an end, and was not cut at the longest length. rewards: float32 [F]. extra:
    what a reward function logged of it. document: by which images.PromptImages knows the prompt.
    """

    row: dict[str, Any]
    prompt: Prompt
    completion: Any
    prompt_ids: list[int]
    completion_ids: list[int]
    log_probs: list[float] | None
    own: list[int]
    ended: bool
    rewards: np.ndarray
    extra: dict[str, Any]
    advantage: float = 0.0
    document: int | None = None


@dataclasses.dataclass
class Experience:
    """The completions of one generation, in the order in which micro-batches take them.

    prompt_ids, completion_ids: int32 [P], [C] of each row. advantages: float32 [N]. num_items: trained tokens of all.
    per_token: name -> float32 [C] of each row, some of PER_TOKEN. documents: int64 [N], by which images.PromptImages
    knows their prompts; None without images.
    """

    prompt_ids: list[np.ndarray]
    completion_ids: list[np.ndarray]
    advantages: np.ndarray
    num_items: float
    per_token: dict[str, list[np.ndarray]]
    documents: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def first(self, count: int) -> "Experience":
        """Its first rows."""
        return Experience(
            prompt_ids=self.prompt_ids[:count],
            completion_ids=self.completion_ids[:count],
            advantages=self.advantages[:count],
            num_items=self.num_items,
            per_token={name: rows[:count] for name, rows in self.per_token.items()},
            documents=None if self.documents is None else self.documents[:count],
        )

    def save(self, path: Path) -> None:
        """Write to an .npz file, bit for bit."""
        ragged = {"prompt_ids": self.prompt_ids, "completion_ids": self.completion_ids, **self.per_token}
        arrays: dict[str, Any] = {"advantages": self.advantages, "num_items": np.float64(self.num_items)}
        if self.documents is not None:
            arrays["documents"] = self.documents
        for name, rows in ragged.items():
            arrays[f"{name}.values"] = np.concatenate(rows)
            arrays[f"{name}.lengths"] = np.asarray([len(row) for row in rows])
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> "Experience":
        """Read what `save` wrote."""
        with np.load(path) as file:
            names = [name.removesuffix(".values") for name in file.files if name.endswith(".values")]
            ragged = {
                name: np.split(file[f"{name}.values"], np.cumsum(file[f"{name}.lengths"])[:-1])
                for name in names
            }
            return cls(
                prompt_ids=ragged.pop("prompt_ids"),
                completion_ids=ragged.pop("completion_ids"),
                advantages=file["advantages"],
                num_items=float(file["num_items"]),
                per_token=ragged,
                documents=file["documents"] if "documents" in file else None,
            )


BLANK = -1  # the document of rows that stand for the largest images


def blank_rows(
    count: int, prompt: int, completion: int, names: Sequence[str], *, images: bool = False
) -> Experience:
    """Rows of these lengths whose values are all 0, for what depends on shapes alone; `names` of PER_TOKEN."""
    return Experience(
        prompt_ids=[np.zeros(prompt, np.int32)] * count,
        completion_ids=[np.zeros(completion, np.int32)] * count,
        advantages=np.zeros(count, np.float32),
        num_items=0.0,
        per_token={name: [np.zeros(completion, np.float32)] * count for name in names},
        documents=np.full(count, BLANK) if images else None,
    )


def bucket_sizes(limit: int) -> np.ndarray:
    """The few static lengths up to a limit, ascending."""
    return np.asarray(buckets(limit))


def bucket(sizes: np.ndarray, lengths: Sequence[int]) -> int:
    """The smallest static length that holds the longest of these.

    Raises:
        ValueError: none does.
    """
    longest = max(lengths)
    if longest > sizes[-1]:
        raise ValueError(
            f"came {longest} tokens, more than the {sizes[-1]} that there is room for (prompt and completion: "
            "from_pretrained's max_seq_length; completion: max_completion_length)"
        )
    return int(sizes[np.searchsorted(sizes, longest)])


class Collator:
    """Rows of experience -> arrays, padded on the right to one of a few lengths, each a compilation.

    Args:
        limit: most tokens of a row.
        pad: token that fills rows up.
    """

    def __init__(self, limit: int, pad: int):
        self._sizes = bucket_sizes(limit)
        self._pad = pad

    def __call__(self, parts: Sequence[tuple[Experience, Sequence[int]]], height: int) -> Arrays:
        """Micro-batches [A, B = height, T] of rows of experience; a part with fewer rows is filled with empty ones.

        Returns:
            input_ids, positions, segment_ids, starts int32; advantages [A, B], num_items [A] and PER_TOKEN float32.
            What belongs to a token stands where it is predicted.
        """
        rows = [(source, i) for source, numbers in parts for i in numbers]
        length = bucket(self._sizes, [len(s.prompt_ids[i]) + len(s.completion_ids[i]) for s, i in rows])
        shape = (len(parts), height, length)
        names = parts[0][0].per_token
        batch: Arrays = {
            "input_ids": np.full(shape, self._pad, np.int32),
            "segment_ids": np.zeros(shape, np.int32),
            "positions": np.zeros(shape, np.int32),
            "starts": np.zeros((*shape[:2], 1), np.int32),
            "advantages": np.zeros(shape[:2], np.float32),
            "num_items": np.asarray([source.num_items for source, _ in parts], np.float32),
            **{name: np.zeros(shape, np.float32) for name in names},
        }
        for a, (source, numbers) in enumerate(parts):
            for b, i in enumerate(numbers):
                prompt, completion = source.prompt_ids[i], source.completion_ids[i]
                end = len(prompt) + len(completion)
                batch["input_ids"][a, b, :end] = np.concatenate([prompt, completion])
                batch["segment_ids"][a, b, :end] = 1
                batch["positions"][a, b, :end] = np.arange(end)
                batch["advantages"][a, b] = source.advantages[i]
                for name in names:
                    batch[name][a, b, len(prompt) - 1 : end - 1] = source.per_token[name][i]
        return batch

    def unpad(self, values: np.ndarray, experience: Experience, numbers: Sequence[int]) -> list[np.ndarray]:
        """Values [B, T] at the places where tokens are predicted -> of each row's completion, [its tokens]."""
        starts = [len(experience.prompt_ids[i]) - 1 for i in numbers]
        return [
            values[b, start : start + len(experience.completion_ids[i])].copy()
            for b, (i, start) in enumerate(zip(numbers, starts, strict=True))
        ]
