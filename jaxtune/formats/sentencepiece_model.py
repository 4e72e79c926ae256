"""Read the pieces of a SentencePiece tokenizer.model without the sentencepiece package.

The file is a protobuf message whose field 1, repeated, is a piece: text (field 1), score (field 2, float) and
type (field 3, 1 unless given). https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


class Piece(NamedTuple):
    """One piece: its text, log-probability or minus its merge rank, and what it is (NORMAL, …)."""

    text: str
    score: float
    kind: int


def read_pieces(path: str | Path) -> list[Piece]:
    """The vocabulary in order of its ids.

    Raises:
        ValueError: the file is no SentencePiece model.
    """
    data = Path(path).read_bytes()
    try:
        pieces = [_piece(value) for field, value in _fields(data) if field == 1 and isinstance(value, bytes)]
    except (IndexError, struct.error, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} is no SentencePiece model: {error}") from error
    if not pieces:
        raise ValueError(f"{path} is no SentencePiece model: it holds no pieces")
    return pieces


def _piece(data: bytes) -> Piece:
    text, score, kind = b"", 0.0, NORMAL
    for field, value in _fields(data):
        match field, value:
            case 1, bytes():
                text = value
            case 2, bytes():
                (score,) = struct.unpack("<f", value)
            case 3, int():
                kind = value
    return Piece(text.decode("utf-8"), score, kind)


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """(field number, value) of a message; numbers of fixed width come as their bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        match tag & 7:
            case 0:
                value, at = _varint(data, at)
                yield tag >> 3, value
                continue
            case 1:
                size = 8
            case 2:
                size, at = _varint(data, at)
            case 5:
                size = 4
            case wire:
                raise ValueError(f"unknown wire type {wire} at byte {at}")
        if at + size > len(data):
            raise IndexError(f"a field of {size:,} bytes passes the end of the file")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1
