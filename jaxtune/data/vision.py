"""VisionDataCollator: rows with images to what SFTTrainer trains on, with the arguments of Unsloth's collator.

Every image is opened once before training starts: what is missing, damaged or does not fit its text is found then, and
from the sizes follow the few shapes of a run's batches. While it trains, worker processes open and process the images
of the steps to come (see `image_batches`).
"""

import dataclasses
import hashlib
import itertools
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from tqdm.auto import tqdm

from jaxtune.data.columns import IGNORE, list_dataset
from jaxtune.data.image_encoder import EncodedDocument, ImageEncoder
from jaxtune.data.image_pool import ImagePool, default_workers
from jaxtune.data.image_rows import Document, image_column, naming
from jaxtune.data.image_sources import format_row, reading_row, row_document, vision_rows
from jaxtune.data.images import ImageError, default_cache, is_url, prefetch
from jaxtune.data.long_rows import SHOWN, TooLong, leave_out
from jaxtune.data.prepare import PreparationReport, truncate_and_drop
from jaxtune.data.resize import resize_policy
from jaxtune.data.responses import Markers, ResponseMask, detect_markers
from jaxtune.data.sources import Source as Rows
from jaxtune.images import family

# Tokens that stand for images, or around them, in any family: never a label. A model's own are known besides.
PLACEHOLDERS = frozenset(
    """<|image_pad|> <|video_pad|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image|> <|image_start|>
    <|image_end|> <image> <image_soft_token> <start_of_image> <end_of_image> <fake_token_around_image>
    <global-img> [IMG] [IMG_BREAK] [IMG_END] <|begin_of_image|> <|end_of_image|> <|patch|>
    <|tile_x_separator|> <|tile_y_separator|> <img> </img> <IMG_CONTEXT>""".split()
)
_TILE = re.compile(r"<row_\d+_col_\d+>")
_CHUNK = 16  # documents a worker checks at once
_FEW = 64  # rows that are not worth the start of worker processes


@dataclasses.dataclass(frozen=True)
class Known:
    """Of a document: its tokens, what its images add to each length of the family's arrays, their pixels' digest."""

    length: int
    sizes: Mapping[str, int]
    digest: bytes


class Source(NamedTuple):
    """Rows by number, the folder of their relative paths, and how many of them are one to the user."""

    rows: Any
    folder: Path | None
    together: int


class VisionDataCollator:
    """Give it to `SFTTrainer(data_collator=…)`; rows are of any format of `image_rows`.

    Args:
        model, processor: from FastVisionModel.from_pretrained.
        max_seq_length: tokens of a row at most; None: SFTConfig's max_length.
        formatting_func: row -> row of a known format; it gets PIL images where a dataset stores some.
        resize, resize_dimension, snap_to_patch_size: see `resize_policy`.
        ignore_index: -100.
        train_on_responses_only: train on the answers alone, between response_part and instruction_part; both None: read
            off the chat template. force_match, last_response_only: see `jaxtune.data.train_on_responses_only`.
        num_proc: worker processes, 0: none; None: SFTConfig's dataloader_num_workers.
        completion_only_loss: of rows with prompt and completion train on the completion alone.
        pad_to_multiple_of: row lengths are multiples of it.
        assistant_only_loss: train on the assistant's turns alone, found through the chat template.
        too_long: what happens to rows that are longer than max_length, since cutting one could cut an image in half:
            "drop" leaves them out and tells which, "raise" refuses them.
        image_cache: folder of downloaded images.
        image_folder: where relative paths of images are looked for besides the current folder; None: beside the file
            that the rows come from.
        instruction: rows of images and a text alone become this question about them and its answer.

    Without train_on_responses_only, assistant_only_loss or a completion every token of a row is trained but those that
    stand for images: the user's text too, as in Unsloth.

    Raises:
        ValueError: a model that takes no images, or arguments that contradict each other.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        max_seq_length: int | None = None,
        formatting_func: Callable[[Any], Any] | None = None,
        resize: Any = "min",
        ignore_index: int = IGNORE,
        train_on_responses_only: bool = False,
        instruction_part: str | None = None,
        response_part: str | None = None,
        force_match: bool = True,
        num_proc: int | None = None,
        completion_only_loss: bool = True,
        pad_to_multiple_of: int | None = None,
        resize_dimension: Any = 0,
        snap_to_patch_size: bool = False,
        last_response_only: bool = False,
        *,
        assistant_only_loss: bool = False,
        too_long: TooLong = "drop",
        image_cache: str | Path | None = None,
        image_folder: str | Path | None = None,
        instruction: str | None = None,
    ) -> None:
        if not hasattr(model, "config") or not hasattr(processor, "image_processor"):
            raise TypeError(
                f"VisionDataCollator(model, processor) came with {type(model).__name__} and "
                f"{type(processor).__name__}; expected both as FastVisionModel.from_pretrained gives "
                "them, the processor and not its tokenizer"
            )
        host = family(model.config)
        if host is None:
            raise ValueError(
                f"VisionDataCollator needs a model that takes images; {model.config.model_type} does not. Load one "
                "with FastVisionModel, or leave data_collator out"
            )
        if ignore_index != IGNORE:
            raise ValueError(
                f"ignore_index={ignore_index} is not supported; labels that do not count are {IGNORE}"
            )
        if num_proc is not None and num_proc < 0:
            raise ValueError(f"num_proc={num_proc}: expected a number of worker processes, 0 for none")
        if too_long not in ("drop", "raise"):
            raise ValueError(f"too_long={too_long!r}: expected 'drop' or 'raise'")
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.max_seq_length, self.pad_to_multiple_of = max_seq_length, pad_to_multiple_of
        self.completion_only_loss, self.too_long, self.num_proc = completion_only_loss, too_long, num_proc
        self._formatting, self._instruction = formatting_func, instruction
        self._image_folder = None if image_folder is None else Path(image_folder)
        self._placeholders = np.asarray(
            sorted(host.placeholder_ids | placeholder_ids(self.tokenizer)), np.int32
        )
        self._answers = None
        if train_on_responses_only:
            markers = response_markers(processor, instruction_part, response_part)
            self._answers = ResponseMask(self.tokenizer, markers, force_match, last_response_only)
        self.encoder = ImageEncoder(
            processor,
            host,
            resize_policy(resize, resize_dimension, snap_to_patch_size, model.config),
            np.dtype(model.dtype).name,
            assistant_only_loss,
            default_cache() if image_cache is None else Path(image_cache),
        )
        self._pool: ImagePool | None = None
        self._text_field = "text"
        self._rows: list[tuple[Source, int]] = []  # of every document: where it is
        self._known: list[Known] = []

    # -- one batch, as notebooks look at it ------------------------------------------------------------------

    def __call__(self, examples: Sequence[Any]) -> dict[str, np.ndarray]:
        """The processor's output for some rows, padded on the right, with labels: arrays [B, T] and the images'.

        It shows what is trained; the trainer makes its batches itself. Rows longer than max_seq_length are left out, or
        raise ValueError, as `too_long` says.
        """
        source = Source(examples, None, 1)
        documents = [self._read(source, number) for number in range(len(examples))]
        encoded = [self.encoder.encode(document) for document in documents]
        lengths = np.asarray([len(one.ids) for one in encoded])
        fits = self._fitting(lengths, self.max_seq_length, 1)
        documents, encoded = [*itertools.compress(documents, fits)], [*itertools.compress(encoded, fits)]
        padding = {"padding": True, "padding_side": "right", "pad_to_multiple_of": self.pad_to_multiple_of}
        batch = dict(self.encoder.processed(documents, return_tensors="np", **padding))
        labels = np.full(batch["input_ids"].shape, IGNORE, np.int64)
        for place, one in enumerate(encoded):
            batch["input_ids"][place, : len(one.ids)] = one.ids
            labels[place, : len(one.ids)] = self._labels(one)
        return batch | {"labels": labels}

    # -- a dataset -------------------------------------------------------------------------------------------

    def prepare(
        self,
        dataset: Rows | Sequence[Any],
        *,
        max_length: int | None = None,
        workers: int | None = None,
        assistant_only_loss: bool = False,
        text_field: str = "text",
        progress: bool = True,
        together: int = 1,
        folder: Path | None = None,
    ) -> datasets.Dataset:
        """Opens every image, tokenises every row and decides which tokens are trained.

        Args:
            dataset: see `load_dataset`, or a list of rows that hold PIL images. Relative paths of images are looked for
                in the current folder, then beside a local file.
            max_length: tokens; None: not limited.
            workers: processes; None: as many as `default_workers` says, none for few rows.
            assistant_only_loss: as the collator's argument.
            text_field: column of plain texts.
            progress: show bars.
            together: so many rows that follow each other are one to the user: messages give them one number, and one
                that is too long takes the others with it.
            folder: where a list of rows came from, if it was a file.

        Returns:
            int32 columns input_ids and labels, as of `prepare_dataset`, and documents: the number by which this
            collator knows the row.

        Raises:
            ValueError: rows that cannot be used; says how many and names the first.
        """
        rows, beside = vision_rows(dataset)
        self._text_field, folder = text_field, folder or beside
        if assistant_only_loss and not self.encoder.assistant_only:
            self.close()
            self.encoder = dataclasses.replace(self.encoder, assistant_only=True)
        source = Source(rows, folder, together)
        found = self._check(
            partial(self._read, source), len(rows), workers, progress, advice=self._advice(rows[0])
        )
        lengths = np.asarray([len(one.ids) for one in found], np.int64)
        limit = (
            self.max_seq_length if max_length is None else min(max_length, self.max_seq_length or max_length)
        )
        fits = self._fitting(lengths, limit, together)
        kept = [one for one, fit in zip(found, fits, strict=True) if fit]
        first = len(self._rows)
        self._rows += [(source, number) for number in np.flatnonzero(fits).tolist()]
        self._known += [Known(len(one.ids), one.sizes, one.digest) for one in kept]
        columns = {
            "input_ids": (np.concatenate([one.ids for one in kept]), lengths[fits]),
            "labels": (np.concatenate([self._labels(one) for one in kept]), lengths[fits]),
            "documents": (np.arange(first, len(self._rows)), np.ones(len(kept), np.int64)),
        }
        report = PreparationReport(
            len(rows), len(kept), len(rows) - len(kept), 0, int(lengths.max(initial=0)), limit
        )
        return truncate_and_drop(list_dataset(columns), None, explain=self._explain, earlier=report)

    def check(self, documents: Sequence[Document], *, progress: bool = True) -> None:
        """Opens every image of some documents, and tokenises their texts.

        Raises:
            ImageError: some cannot be used; says how many and names the first.
        """
        try:
            self._check(documents.__getitem__, len(documents), None, progress)
        finally:
            self.close()

    def document(self, number: int) -> Document:
        """A row by the number that the column documents has for it."""
        return self._read(*self._rows[number])

    def row(self, number: int) -> Any:
        """A row as it came, its images not decoded, by the same number."""
        source, row = self._rows[number]
        return source.rows[row]

    def folder(self, number: int) -> Path | None:
        """Where relative paths of that row's images are looked for besides the current folder."""
        return self._image_folder or self._rows[number][0].folder

    def known(self, number: int) -> Known:
        """What was found of a row when its images were checked."""
        return self._known[number]

    def image_digest(self, numbers: Sequence[int] | np.ndarray) -> str:
        """16 hex digits that change with any pixel of these documents' images."""
        digest = hashlib.blake2b(digest_size=8)
        for number in numbers:
            digest.update(self._known[int(number)].digest)
        return digest.hexdigest()

    def pool(self, workers: int) -> ImagePool:
        """The worker processes, kept until `close` or another number of them is asked for."""
        if self._pool is None or self._pool.workers != workers:
            self.close()
            self._pool = ImagePool(self.encoder, workers)
        return self._pool

    def close(self) -> None:
        """Ends the worker processes."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    # -- how -------------------------------------------------------------------------------------------------

    def _read(self, source: Source, place: int) -> Document:
        number, folder = place // source.together, self._image_folder or source.folder
        with naming(number):
            row = source.rows[place]
            if self._formatting is not None:
                row = format_row(self._formatting, row, folder, self.encoder.cache)
        if self._instruction is not None:
            row = reading_row(row, self._instruction, number)
        return row_document(row, number, folder, self._text_field)

    def _labels(self, one: EncodedDocument) -> np.ndarray:
        """int32 [T]: ids where every mask that applies is set, -100 elsewhere."""
        keep = ~np.isin(one.ids, self._placeholders)
        if self.completion_only_loss and one.completion is not None:
            keep &= one.completion
        if one.assistant is not None:
            keep &= one.assistant
        if self._answers is not None:
            keep &= self._answers(one.ids)
        return np.where(keep, one.ids, IGNORE).astype(np.int32)

    def _check(
        self,
        read: Callable[[int], Document],
        count: int,
        workers: int | None,
        progress: bool,
        advice: str = "",
    ) -> list[EncodedDocument]:
        """Every document encoded; raises an error of all that cannot be."""
        if workers is None:
            workers = 0 if count < _FEW else default_workers()
        found: list[EncodedDocument | ImageError] = []
        waiting: deque = deque()
        pool = self.pool(workers)
        with tqdm(total=count, desc="Checking images", unit="row", disable=None if progress else True) as bar:

            def take() -> None:
                results = waiting.popleft().result()
                found.extend(results)
                bar.update(len(results))

            for documents in self._chunks(read, count, progress):
                waiting.append(pool.encode(documents))
                if len(waiting) > 2 * workers:
                    take()
            while waiting:
                take()
        errors = [one for one in found if isinstance(one, ImageError)]
        if errors:
            self.close()
            more = f"\n… and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
            said = "\n".join(str(error) for error in errors[:SHOWN])
            raise ImageError(f"{len(errors)} of {count} rows cannot be used:\n{said}{more}{advice}")
        return [one for one in found if isinstance(one, EncodedDocument)]

    def _advice(self, row: Any) -> str:
        """For errors in rows of an image and a text that has no placeholder for it."""
        text = row.get(self._text_field) if isinstance(row, Mapping) else None
        if self._instruction is not None or not isinstance(text, str) or image_column(row) is None:
            return ""
        return (
            "\nIf the text is what is to be said of the image, give instruction (--image_instruction), the question "
            "that it answers"
        )

    def _chunks(
        self, read: Callable[[int], Document], count: int, progress: bool
    ) -> Iterator[list[Document | ImageError]]:
        """Documents, a few at a time, what they need from the net downloaded (in its place: why it cannot be); errors
        of rows that are none."""
        failed: dict[str, ImageError] = {}

        def got(image: Any) -> Any:
            return failed.get(image, image) if is_url(image) else image

        for numbers in itertools.batched(range(count), _CHUNK):
            documents: list[Document | ImageError] = []
            for number in numbers:
                try:
                    documents.append(read(number))
                except ImageError as error:
                    documents.append(error)
            good = (document for document in documents if isinstance(document, Document))
            urls = [image for document in good for image in document.images if is_url(got(image))]
            failed |= prefetch(urls, self.encoder.cache or default_cache(), progress=progress)
            yield [one if isinstance(one, ImageError) else one.with_images(got) for one in documents]

    def _fitting(self, lengths: np.ndarray, limit: int | None, together: int) -> np.ndarray:
        """bool [rows]: what is not too long; tells or refuses the rest."""
        lengths = lengths.reshape(-1, together).max(1)
        fits = np.ones(len(lengths), bool) if limit is None else lengths <= limit
        advice = "rows with images are not cut. Raise max_length, or make the images smaller (resize)"
        leave_out(fits, lengths, f"rows are longer than max_length={limit}", advice, self.too_long)
        return fits.repeat(together)

    def _explain(self, dataset: datasets.Dataset) -> str:
        ids = dataset[0]["input_ids"]
        return (
            f"all {len(dataset)} rows are without a token to train: what is masked (images, prompts, all but the "
            f"answers) is all there is. The first row reads:\n{self.tokenizer.decode(ids)[-2000:]}"
        )


UnslothVisionDataCollator = VisionDataCollator


def placeholder_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of a vocabulary's tokens that stand for images or mark them."""
    added = tokenizer.get_added_vocab()
    return frozenset(
        number for token, number in added.items() if token in PLACEHOLDERS or _TILE.fullmatch(token)
    )


def response_markers(processor: Any, instruction: str | None, response: str | None) -> Markers:
    """Markers as given, or read off the processor's chat template.

    Raises:
        ValueError: one alone is given, or the template does not tell.
    """
    if (instruction is None) != (response is None):
        raise ValueError(
            "give both instruction_part and response_part, or neither; came "
            f"instruction_part={instruction!r}, response_part={response!r}"
        )
    if instruction is None or response is None:
        return detect_markers(processor)
    return Markers(instruction, response)
