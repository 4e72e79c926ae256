"""Experience -> arrays in which a prompt stands once before its completions (models.shared_prefix)."""

from collections.abc import Sequence

import numpy as np

from jaxtune.rl.experience import Arrays, Experience, bucket, bucket_sizes


class GroupCollator:
    """Groups of experience -> arrays; prompts and completions are each padded to one of a few lengths.

    Args:
        prompt, completion: most tokens of each.
        pad: token that fills up.
        group: completions of a prompt.
    """

    def __init__(self, prompt: int, completion: int, pad: int, group: int):
        self._prompts, self._completions = bucket_sizes(prompt), bucket_sizes(completion)
        self._pad, self._group = pad, group

    def __call__(self, parts: Sequence[tuple[Experience, Sequence[int]]], height: int) -> Arrays:
        """Micro-batches [A] of whole groups; a part with fewer rows than `height` is filled with empty groups.

        Returns:
            With R = height / group: input_ids, positions, segment_ids int32 [A, R, P + G·C]; row_positions,
            row_segments [A, B, P + C] and row_starts [A, B, 2]; advantages [A, B], num_items [A]; what belongs to a
            completion's tokens float32 [A, B, C].

        Raises:
            ValueError: a prompt that is not the same in its whole group, or too long.
        """
        rows = [(source, i) for source, numbers in parts for i in numbers]
        prompt = bucket(self._prompts, [len(source.prompt_ids[i]) for source, i in rows])
        completion = bucket(self._completions, [len(source.completion_ids[i]) for source, i in rows])
        count, groups = len(parts), height // self._group
        shared = (count, groups, prompt + self._group * completion)
        apart = (count, height, prompt + completion)
        names = parts[0][0].per_token
        batch: Arrays = {
            "input_ids": np.full(shared, self._pad, np.int32),
            "positions": np.zeros(shared, np.int32),
            "segment_ids": np.zeros(shared, np.int32),
            "row_positions": np.zeros(apart, np.int32),
            "row_segments": np.zeros(apart, np.int32),
            "row_starts": np.tile(np.asarray([0, -1], np.int32), (count, height, 1)),
            "advantages": np.zeros((count, height), np.float32),
            "num_items": np.asarray([source.num_items for source, _ in parts], np.float32),
            **{name: np.zeros((count, height, completion), np.float32) for name in names},
        }
        for a, (source, numbers) in enumerate(parts):
            for b, i in enumerate(numbers):
                micro = {name: array[a] for name, array in batch.items()}
                self._place(
                    micro, source, i, b, source.prompt_ids[numbers[b - b % self._group]], prompt, completion
                )
        return batch

    def _place(
        self,
        batch: Arrays,
        source: Experience,
        i: int,
        b: int,
        first: np.ndarray,
        prompt: int,
        completion: int,
    ) -> None:
        """Row i of experience as row b of a micro-batch; `first` is the prompt of its group's first row."""
        ids, own = source.prompt_ids[i], source.completion_ids[i]
        if not np.array_equal(ids, first):
            raise ValueError(
                "shared_prefix=True needs the same prompt_ids for all completions of a prompt; rollout_func gave others"
            )
        r, slot = divmod(b, self._group)
        begin, end = prompt - len(ids), len(ids) + len(own)
        at = prompt + slot * completion
        for place, tokens, positions in (
            (slice(begin, prompt), ids, np.arange(len(ids))),
            (slice(at, at + len(own)), own, np.arange(len(ids), end)),
        ):
            batch["input_ids"][r, place] = tokens
            batch["positions"][r, place] = positions
            batch["segment_ids"][r, place] = 1
        batch["row_positions"][b, begin : begin + end] = np.arange(end)
        batch["row_segments"][b, begin : begin + end] = 1
        if begin:
            batch["row_starts"][b, 1] = begin
        batch["advantages"][b] = source.advantages[i]
        for name, values in source.per_token.items():
            batch[name][b, : len(own)] = values[i]

    def unpad(self, values: np.ndarray, experience: Experience, numbers: Sequence[int]) -> list[np.ndarray]:
        """Values [B, C] of completions' tokens -> of each row, [its tokens]."""
        return [values[b, : len(experience.completion_ids[i])].copy() for b, i in enumerate(numbers)]
