"""Documents with images to tokens, masks and the arrays of a vision tower: what worker processes do.

Text goes through the processor's own chat template and tokenizer, images through transformers' own image processor; the
model family's `VisionFamily` packs what comes out. Nothing here needs jax.
"""

import zlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jinja2 import TemplateError
from PIL import Image
from transformers.utils.chat_template_utils import render_jinja_template

from jaxtune.data.image_rows import Document, Messages, naming
from jaxtune.data.images import ImageError, open_image
from jaxtune.data.resize import Resize
from jaxtune.data.templates import has_marks, marked_variant
from jaxtune.images import Processed, VisionFamily, check_row

PIXELS = "pixels"  # of a family's arrays, the one that is cast to the model's dtype
UNSCALED = {"do_rescale": False, "do_normalize": False}  # where only shapes are wanted: a third less time
Span = tuple[int, int]


@dataclass(frozen=True)
class EncodedDocument:
    """What is known of a document before training: int32 [T] ids, bool [T] masks of what may be learned (None: all).

    sizes: what its images add to each length of the family's arrays, {} without images. digest: of their pixels.
    """

    ids: np.ndarray
    completion: np.ndarray | None
    assistant: np.ndarray | None
    sizes: Mapping[str, int]
    digest: bytes


@dataclass(frozen=True)
class ImageArrays:
    """A micro-batch's images: the family's arrays, and int32 [T, 3] rotary positions of each document or None."""

    arrays: dict[str, np.ndarray]
    rope_positions: list[np.ndarray | None]


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt to be continued.

    ids: int32 [T]. text: what they are the tokens of, with one placeholder for each image. pictures: its images as the
    processor got them. row: what it gave of them, {} without images. digest: of their pixels.
    """

    ids: np.ndarray
    text: str
    pictures: list[Image.Image]
    row: Processed
    digest: bytes


@dataclass(frozen=True)
class ImageEncoder:
    """
    Attributes:
        processor: transformers' own; pickled into worker processes.
        family: the host's side of the model.
        resize: what happens to an image before the processor's own resizing.
        dtype: of the pixels.
        assistant_only: find out which tokens the assistant said.
        cache: folder of downloaded images; None: the default.
    """

    processor: Any
    family: VisionFamily
    resize: Resize
    dtype: str = "float32"
    assistant_only: bool = False
    cache: Path | None = None

    def encode(self, document: Document) -> EncodedDocument:
        """Tokens and sizes of a document, its images opened and processed.

        Raises:
            ImageError: names the row, and the image if it is one's fault.
        """
        with naming(document.number):
            pictures = self._pictures(document)
            ids, completion, assistant, row = self._processed(document, pictures, **UNSCALED)
            check_row(self.family, ids, row)
            sizes = {} if row is None else self.family.sizes([row])
        return EncodedDocument(ids, completion, assistant, sizes, _digest(pictures))

    def arrays(
        self,
        documents: Sequence[Document],
        lengths: Sequence[int],
        digests: Sequence[bytes],
        sizes: Mapping[str, int],
    ) -> ImageArrays:
        """The images of a micro-batch's documents, in their order.

        Args:
            lengths, digests: of each document, as `encode` found them. sizes: lengths of the arrays' axes.

        Raises:
            ImageError: an image is gone, or not the one that `encode` saw; or the text is not.
        """
        rows, rope = [], []
        for document, length, digest in zip(documents, lengths, digests, strict=True):
            with naming(document.number):
                pictures = self._pictures(document)
                if _digest(pictures) != digest:
                    raise ImageError("an image has changed since the data was checked")
                ids, _, _, row = self._processed(document, pictures)
                if len(ids) != length:
                    raise ImageError(f"{len(ids)} tokens now, and {length} when the data was checked")
            rope.append(self.family.rope_positions(ids, row))
            rows.append({} if row is None else row)
        return ImageArrays(self.packed(rows, sizes), rope)

    def packed(self, rows: Sequence[Processed], sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        """The family's arrays of some rows' images, pixels in the model's dtype."""
        arrays = self.family.image_arrays(rows, sizes)
        dtype = np.dtype(getattr(ml_dtypes, self.dtype, self.dtype))
        return arrays | {PIXELS: arrays[PIXELS].astype(dtype)}

    def prompt(self, document: Document) -> EncodedPrompt:
        """A document that has no completion.

        Raises:
            ImageError: as `encode`.
        """
        with naming(document.number):
            pictures = self._pictures(document)
            ids, _, _, row = self._processed(document, pictures)
            check_row(self.family, ids, row)
            return EncodedPrompt(ids, self._texts(document)[0], pictures, row or {}, _digest(pictures))

    def processed(self, examples: Sequence[Document], **options: Any) -> Any:
        """The processor's own output for some documents; options as its call takes them.

        Raises:
            ImageError: as `encode`.
        """
        texts, pictures = [], []
        for document in examples:
            with naming(document.number):
                texts.append("".join(self._texts(document)))
                pictures.append(self._pictures(document))
        return self.processor(
            text=texts, images=pictures if any(pictures) else None, add_special_tokens=False, **options
        )

    def _pictures(self, document: Document) -> list[Image.Image]:
        pictures = []
        for number, source in enumerate(document.images):
            try:
                pictures.append(self.resize(open_image(source, self.cache)))
            except ValueError as error:
                which = f"image {number + 1} of {len(document.images)}: " if len(document.images) > 1 else ""
                raise ImageError(f"{which}{error}") from error
        return pictures

    def _processed(
        self, document: Document, pictures: Sequence[Image.Image], **options: bool
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None, dict[str, np.ndarray] | None]:
        """(ids, completion mask, assistant mask, what belongs to the images or None); options: of the processor."""
        prompt, completion = self._texts(document)
        wanted = ("return_offsets_mapping", "return_text_replacement_offsets") if self.assistant_only else ()
        # The text in front takes its images; what follows is tokenised by itself, so the seam is known (as in TRL).
        out = self.processor(
            text=[prompt],
            images=[list(pictures)] if pictures else None,
            add_special_tokens=False,
            return_tensors="np",
            **dict.fromkeys(wanted, True),
            **options,
        )
        ids = np.asarray(out["input_ids"][0], np.int32)
        mask = learned = None
        if self.assistant_only:
            learned = self._assistant_mask(document, prompt, out)
        if document.completion is not None:
            more = self.processor.tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
            mask = np.arange(len(ids) + len(more)) >= len(ids)
            ids = np.concatenate([ids, np.asarray(more, np.int32)])
            learned = None if learned is None else mask
        given = {key: np.asarray(out[key]) for key in self.family.processor_keys if key in out}
        row = dict(self.family.rows(given, [ids])[0]) if pictures else None
        return ids, mask, learned, row

    # -- text ------------------------------------------------------------------------------------------------

    def _texts(self, document: Document) -> tuple[str, str]:
        """(prompt, completion) as text; without a completion everything is prompt."""
        prompt, completion = document.prompt, document.completion
        if isinstance(prompt, str):
            return prompt, completion if isinstance(completion, str) else ""
        if not isinstance(completion, list):
            return self._render(prompt, document), ""
        asked = self._render(prompt, document, add_generation_prompt=True)
        whole = self._render([*prompt, *completion], document)
        shared = next(
            (i for i, (a, b) in enumerate(zip(asked, whole)) if a != b), min(len(asked), len(whole))
        )
        return whole[:shared], whole[shared:]

    @property
    def _template(self) -> str:
        template = self.processor.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if template is None:
            raise ImageError(
                "it is a conversation and the processor has no chat_template; set processor.chat_template"
            )
        return (marked_variant(template) or template) if self.assistant_only else template

    def _render(self, messages: Messages, document: Document, **more: Any) -> str:
        options = {**document.options, **more, "chat_template": self._template}
        try:
            return self.processor.apply_chat_template(messages, tokenize=False, **options)
        except (TemplateError, TypeError) as error:
            raise ImageError(f"the chat template cannot render it: {error}") from error

    # -- what the assistant said -----------------------------------------------------------------------------

    def _assistant_mask(self, document: Document, text: str, out: Mapping[str, Any]) -> np.ndarray:
        """bool [T] of a processed text: tokens that hold a character of an answer."""
        if isinstance(document.prompt, str):
            raise ImageError("assistant_only_loss needs conversations, and it is a plain text")
        if "offset_mapping" not in out:
            raise ImageError(
                f"assistant_only_loss: {type(self.processor).__name__} does not tell where its tokens are in the text; "
                "use train_on_responses_only"
            )
        begins, ends = np.asarray(out["offset_mapping"][0]).reshape(-1, 2).T
        grown = out["text_replacement_offsets"][0] if out.get("text_replacement_offsets") else []
        marks = [one["span"][1] for one in grown]  # after each placeholder the text has moved
        moved = [0, *(one["new_span"][1] - one["span"][1] for one in grown)]
        mask = np.zeros(len(begins), bool)
        spans = [] if document.completion is not None else self._answers(document, text)
        for start, stop in spans:
            start, stop = (at + moved[bisect_right(marks, at)] for at in (start, stop))
            mask |= (begins < stop) & (ends > start)
        return mask

    def _answers(self, document: Document, text: str) -> list[Span]:
        """Where the assistant's turns are in a rendered conversation: what the template marks, or what each adds."""
        messages, options = document.prompt, dict(document.options)
        assert isinstance(messages, list), "plain text was refused before"
        if has_marks(self._template):
            tokens = self.processor.tokenizer.special_tokens_map
            options = {"chat_template": self._template, **tokens, **options}
            return render_jinja_template([messages], return_assistant_tokens_mask=True, **options)[1][0]
        spans = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:turn], document, add_generation_prompt=True)
            through = self._render(messages[: turn + 1], document)
            if not (text.startswith(before) and text.startswith(through)):
                raise ImageError(
                    "assistant_only_loss: the chat template renders a turn differently once others follow it; put "
                    "{% generation %} marks into it, or use train_on_responses_only"
                )
            spans.append((len(before), len(through)))
        return spans


def _digest(pictures: Sequence[Image.Image]) -> bytes:
    """Changes with the size and any pixel of images; a cryptographic hash would take a sixth of a worker's time."""
    found = 0
    for picture in pictures:
        found = zlib.crc32(picture.tobytes(), zlib.crc32(repr(picture.size).encode(), found))
    return found.to_bytes(4)
