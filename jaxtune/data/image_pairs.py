"""Preferences on images: pairs as documents of a VisionDataCollator, two of each row.

rows (prompt, chosen, rejected, images) -> [prompt + chosen, prompt + rejected, …] -> one row a pair again
"""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from jaxtune.data.columns import DOCUMENTS, IGNORE, list_dataset, ragged_column
from jaxtune.data.image_rows import IMAGE_COLUMNS
from jaxtune.data.image_sources import vision_rows
from jaxtune.data.preferences import PAIR_COLUMNS, split_prompt
from jaxtune.data.vision import VisionDataCollator

SIDES = ("chosen", "rejected")


def prepare_image_pairs(
    dataset: Any,
    collator: VisionDataCollator,
    max_length: int | None = None,
    *,
    workers: int | None = None,
    progress: bool = True,
) -> datasets.Dataset:
    """Opens every image and tokenises every pair; ids equal those of TRL's DataCollatorForVisionPreference.

    Args:
        dataset: see `load_dataset`, or a list of rows. Columns chosen and rejected, and prompt if they do not begin
            with it alike: all texts, with the processor's image token where an image goes, or all lists of messages;
            and images or image, or the images are in the messages. A text gets no end token.
        collator: of a model that takes images; it keeps the rows.
        max_length: tokens; pairs of which a side is longer are dropped or refused, as the collator says.
        workers, progress: as of `VisionDataCollator.prepare`.

    Returns:
        int32 columns prompt_ids, chosen_ids, rejected_ids, and documents: the two numbers by which the collator knows
        a pair's sides.

    Raises:
        ValueError: rows that cannot be used; says how many and names the first.
    """
    rows, folder = vision_rows(dataset)
    sides = PairSides(rows)
    found = collator.prepare(
        sides, max_length=max_length, workers=workers, progress=progress, together=2, folder=folder
    )
    ids, labels = ragged_column(found, "input_ids"), ragged_column(found, "labels")
    numbers = ragged_column(found, DOCUMENTS).values.reshape(-1, 2)
    starts = np.asarray([int(np.argmax(labels.row(i) != IGNORE)) for i in range(len(ids))])
    pairs = range(0, len(ids), 2)
    for i in pairs:
        if not np.array_equal(ids.row(i)[: starts[i]], ids.row(i + 1)[: starts[i + 1]]):
            raise ValueError(
                f"row {collator.document(int(numbers[i // 2, 0])).number}: the prompt's tokens are others before "
                "chosen than before rejected; the chat template renders it differently"
            )
    columns = [
        [ids.row(i)[: starts[i]] for i in pairs],
        *([ids.row(i + side)[starts[i + side] :] for i in pairs] for side in range(2)),
    ]
    made = {
        name: (np.concatenate(column), np.asarray([len(one) for one in column]))
        for name, column in zip(PAIR_COLUMNS, columns, strict=True)
    }
    return list_dataset(made | {DOCUMENTS: (numbers.reshape(-1), np.full(len(numbers), 2))})


class PairSides(Sequence[dict[str, Any]]):
    """Rows 2i and 2i + 1 are the sides of row i, each as prompt and completion."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]):
        self._rows = rows

    def __len__(self) -> int:
        return 2 * len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        row = self._rows[index // 2]
        if missing := [name for name in SIDES if row.get(name) is None]:
            raise ValueError(
                f"a preference dataset has the columns chosen and rejected, and prompt if they do not begin with it; "
                f"{' and '.join(missing)} missing among {', '.join(row)}"
            )
        if row.get("prompt") is None:
            row = {**row, **split_prompt(row["chosen"], row["rejected"])}
        kept = {name: row[name] for name in (*IMAGE_COLUMNS, "tools", "chat_template_kwargs") if name in row}
        return kept | {"prompt": row["prompt"], "completion": row[SIDES[index % 2]]}
