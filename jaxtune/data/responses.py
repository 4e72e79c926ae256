"""`train_on_responses_only`: mask everything but the answers, found by the text around them.

Markers are looked for in the bytes that the tokens stand for, not among the tokens: a tokenizer that merges a
marker's last newline with the answer's first, or its first space with the word before, changes nothing. Added
tokens (<|im_start|>, …) count as one indivisible sign each, so a user who types them as plain text is not
mistaken for one.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from jaxtune.data.columns import DOCUMENTS, IGNORE, ragged_column, with_documents
from jaxtune.data.prepare import map_tokens, preparation_report, truncate_and_drop
from jaxtune.data.tokenise import render_chat

logger = logging.getLogger(__name__)

# A byte that valid UTF-8 never holds: it opens and closes the sign of an added token.
SIGN = b"\xff"
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
TURNS = 3
WHITESPACE = b" \n\t\r"


@dataclass(frozen=True)
class Markers:
    """The text before each user message and before each answer."""

    instruction: str
    response: str


class TokenBytes:
    """The bytes each token of a vocabulary stands for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        kinds = _decoder_kinds(tokenizer)
        self._byte_of = (
            {letter: byte for byte, letter in bytes_to_unicode().items()} if "ByteLevel" in kinds else None
        )
        self._tokenizer = tokenizer
        self._added = tokenizer.added_tokens_decoder
        self._known: dict[int, bytes] = {}

    def __getitem__(self, token_id: int) -> bytes:
        if token_id not in self._known:
            self._known[token_id] = self._bytes(token_id)
        return self._known[token_id]

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return SIGN + str(token_id).encode() + SIGN
        token: Any = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return b""
        if self._byte_of is not None and set(token) <= self._byte_of.keys():
            return bytes(self._byte_of[letter] for letter in token)
        if match := BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace("\u2581", " ").encode()

    def join(self, ids: Sequence[int] | np.ndarray) -> tuple[bytes, np.ndarray]:
        """All bytes of a row, and where each token ends among them: int64 [T]."""
        pieces = [self[int(token)] for token in ids]
        return b"".join(pieces), np.cumsum([len(piece) for piece in pieces])

    def of_text(self, text: str) -> bytes:
        """A marker as it looks inside a row."""
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        found = self.join(ids)[0]
        # SentencePiece puts a space before the first word of a text.
        return found.removeprefix(b" ") if found.startswith(b" ") and not text.startswith(" ") else found


def _decoder_kinds(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Names of the steps by which a fast tokenizer turns tokens back into text."""
    decoder = tokenizer.backend_tokenizer.decoder
    if decoder is None:
        return set()
    state = json.loads(decoder.__getstate__())
    return {part["type"] for part in state.get("decoders", [state])}


class ResponseMask:
    """Finds the answers in token ids.

    Args:
        tokenizer: a fast tokenizer.
        markers: text before user messages and before answers.
        force_match: whitespace at the markers' ends has to be there as given; False lets it vary.
        last_only: keep only the last answer of a row.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        markers: Markers,
        force_match: bool = True,
        last_only: bool = False,
    ):
        self.tokens = TokenBytes(tokenizer)
        self.last_only = last_only
        self.instruction = self._pattern(markers.instruction, force_match)
        self.response = self._pattern(markers.response, force_match)

    def _pattern(self, text: str, force_match: bool) -> re.Pattern[bytes]:
        marker = self.tokens.of_text(text)
        core = marker.strip(WHITESPACE)
        if not core:
            raise ValueError(f"a marker must hold more than whitespace; came {text!r}")
        if force_match:
            return re.compile(re.escape(marker))
        return re.compile(rb"\s*" + re.escape(core) + rb"[^\S\n]*\n*" * (marker != marker.rstrip(WHITESPACE)))

    def __call__(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """bool [T]: tokens that hold at least one byte of an answer.

        An answer goes from the end of a response marker to the next instruction marker or the end of the row,
        so the end-of-turn token is part of it.
        """
        row, ends = self.tokens.join(ids)
        begins = np.concatenate([[0], ends[:-1]]).astype(np.int64) if len(ends) else ends
        mask = np.zeros(len(ends), bool)
        for start, stop in self._answers(row):
            mask |= (ends > start) & (begins < stop)
        return mask

    def _answers(self, row: bytes) -> list[tuple[int, int]]:
        """(first byte, byte after the last) of each answer."""
        instructions = [match.start() for match in self.instruction.finditer(row)]
        spans: list[tuple[int, int]] = []
        for match in self.response.finditer(row):
            if spans and match.start() < spans[-1][1]:
                if self.last_only:
                    spans[-1] = match.end(), spans[-1][1]
                continue  # an answer that follows another without a user message between belongs to it
            stop = next((start for start in instructions if start >= match.end()), len(row))
            spans.append((match.end(), stop))
        return spans[-1:] if self.last_only else spans


def detect_markers(processing_class: Any) -> Markers:
    """Read both markers off the chat template, by rendering a conversation of known contents.

    Args:
        processing_class: a tokenizer, or a processor of text and images, whose contents are lists of parts.

    Raises:
        ValueError: no chat template, or none in which user and assistant messages have openings of their own.
    """
    tokenizer = text_tokenizer(processing_class)
    if processing_class.chat_template is None:
        raise ValueError(
            "there is no chat template to read the markers from; pass instruction_part and response_part, "
            "for instance '<|im_start|>user\\n' and '<|im_start|>assistant\\n'"
        )
    contents = [f"{who}WORDS{turn}" for turn in range(TURNS) for who in ("ASK", "SAY")]
    roles = ["user", "assistant"] * TURNS
    messages = [
        {
            "role": role,
            "content": content if tokenizer is processing_class else [{"type": "text", "text": content}],
        }
        for role, content in zip(roles, contents, strict=True)
    ]
    try:
        rendered = render_chat(processing_class, messages)
        places = [rendered.index(content) for content in contents]
    except ValueError as error:
        raise ValueError(
            "cannot read the markers off this chat template; pass instruction_part and response_part"
        ) from error
    between = [
        _pieces(rendered[left + len(content) : right], tokenizer)
        for content, (left, right) in zip(contents, pairwise(places), strict=False)
    ]
    closing = _pieces(rendered[places[-1] + len(contents[-1]) :], tokenizer)
    # The closing of a turn is what also stands at the very end; the rest opens the next one.
    response = _shared_head([_without_head(gap, closing) for gap in between[0::2]])
    instruction = _shared_head([_without_head(gap, closing) for gap in between[1::2]])
    markers = Markers("".join(instruction), "".join(response))
    if (
        not markers.instruction.strip()
        or not markers.response.strip()
        or markers.instruction == markers.response
    ):
        raise ValueError(
            f"the chat template opens user messages with {markers.instruction!r} and answers with "
            f"{markers.response!r}, which does not tell them apart; pass instruction_part and response_part"
        )
    return markers


def text_tokenizer(processing_class: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a processor, or the tokenizer itself."""
    return getattr(processing_class, "tokenizer", processing_class)


def chat_tokenizer(processing_class: Any) -> PreTrainedTokenizerBase:
    """The tokenizer for rows of text alone, with its processor's chat template where it has none."""
    tokenizer = text_tokenizer(processing_class)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = processing_class.chat_template
    return tokenizer


def _pieces(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """`text` split into added tokens, tag-like words and single characters, none of which may be cut."""
    added: list[str] = [token.content for token in tokenizer.added_tokens_decoder.values()]
    added.sort(key=len, reverse=True)
    names = [re.escape(token) for token in added if token.strip()]
    return re.findall("|".join([*names, r"<[^<>\s]*>|\[[^\[\]\s]*\]|\w+|[\s\S]"]), text)


def _shared_head(lists: Sequence[Sequence[str]]) -> list[str]:
    head = []
    for pieces in zip(*lists, strict=False):
        if len(set(pieces)) > 1:
            break
        head.append(pieces[0])
    return head


def _without_head(pieces: list[str], head: list[str]) -> list[str]:
    return pieces[len(_shared_head([pieces, head])) :]


def train_on_responses_only(
    trainer: Any,
    instruction_part: str | None = None,
    response_part: str | None = None,
    force_match: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    return_function: bool = False,
    num_proc: int | None = None,
    last_response_only: bool = False,
) -> Any:
    """Train on the answers only: every label outside of them becomes -100; what is -100 already stays so.

    Args:
        trainer: has processing_class, train_dataset and eval_dataset (a dataset, a dict of them or None),
            tokenised and not packed. They are replaced. May be None with `return_function`.
        instruction_part: text before each user message, for instance "<|im_start|>user\\n".
        response_part: text before each answer. Both None: read off the chat template.
        force_match: the whitespace at the markers' ends has to match; False lets it vary.
        tokenizer: instead of the trainer's.
        return_function: return the function that masks a batch (dict of lists) and leave the trainer alone.
        num_proc: accepted for notebooks that pass it; this takes one process.
        last_response_only: keep only the last answer of each row.

    Returns:
        The trainer (its datasets' `preparation_report` counts the rows that went), or the function.

    Raises:
        ValueError: only one part given, or no row has an answer in it.
    """
    del num_proc
    if (instruction_part is None) != (response_part is None):
        raise ValueError(
            "give both instruction_part and response_part, or neither; came "
            f"instruction_part={instruction_part!r}, response_part={response_part!r}"
        )
    processing_class = tokenizer if tokenizer is not None else trainer.processing_class
    tokenizer = text_tokenizer(processing_class)
    if instruction_part is None or response_part is None:
        markers = detect_markers(processing_class)
        logger.info("markers of the chat template: %r, %r", markers.instruction, markers.response)
    else:
        markers = Markers(instruction_part, response_part)
    mask = ResponseMask(tokenizer, markers, force_match, last_response_only)

    def mask_batch(batch: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, list[np.ndarray]]:
        return {"labels": list(_masked(mask, batch))}

    if return_function:
        return mask_batch

    def masked(data: Any) -> Any:
        if isinstance(data, Mapping):
            return {key: masked(part) for key, part in data.items()}
        return None if data is None else _mask_dataset(data, mask_batch, tokenizer, markers)

    replaced = {name: masked(getattr(trainer, name, None)) for name in ("train_dataset", "eval_dataset")}
    for name, data in replaced.items():
        setattr(trainer, name, data)
    return trainer


def _masked(mask: ResponseMask, batch: Mapping[str, Sequence[Sequence[int]]]) -> Iterator[np.ndarray]:
    """New labels of each row of a batch."""
    known = batch.get("labels", batch["input_ids"])
    for ids, labels in zip(batch["input_ids"], known, strict=True):
        yield np.where(mask(ids), np.asarray(labels), IGNORE).astype(np.int32)


def _mask_dataset(
    dataset: datasets.Dataset,
    mask_batch: Callable[..., Any],
    tokenizer: PreTrainedTokenizerBase,
    markers: Markers,
) -> datasets.Dataset:
    earlier = preparation_report(dataset)

    def explain(masked: datasets.Dataset) -> str:
        ids = dataset[0]["input_ids"]
        cut = ""
        if earlier and earlier.truncated:
            cut = f" {earlier.truncated} rows were cut to max_length={earlier.max_length}, perhaps before their answer."
        return (
            f"none of the {len(masked)} rows has an answer between {markers.response!r} and {markers.instruction!r}."
            f"{cut} Check both parts against the first row (or raise max_length):\n{tokenizer.decode(ids)[:2000]}"
        )

    def mask_rows(batch: Mapping[str, Any]) -> dict[str, Any]:
        return {"input_ids": batch["input_ids"], **mask_batch(batch)}

    masked = map_tokens(dataset.with_format("numpy"), mask_rows, "Masking all but answers")
    if DOCUMENTS in dataset.column_names:
        masked = with_documents(masked, ragged_column(dataset, DOCUMENTS))
    return truncate_and_drop(masked, None, explain=explain, earlier=earlier)
