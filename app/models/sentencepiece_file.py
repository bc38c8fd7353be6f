"""A SentencePiece model file (`source.spm`, `spiece.model`): its pieces, without the library that runs it.

Format: sentencepiece_model.proto of https://github.com/google/sentencepiece, in protobuf's wire format. Nothing of it
is trusted: what libraries follow without looking, above all places in the table of replaced characters, is checked.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

#: Twice what the largest vocabularies of many languages have; and fields of the whole file, four a piece: whoever scans
#: a folder answers requests as well.
MAX_PIECES = 500_000
MAX_FIELDS = 4 * MAX_PIECES

_PIECE, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5
_TEXT, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE = 3
_CHARSMAP = 2
_UNKNOWN, _BYTE = 2, 6
_TYPES = range(1, 7)
_UNIGRAM = 1
_BYTE_TEXT = re.compile(r"<0x[0-9A-F]{2}>")

_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5

#: Units in a block of a Darts double array, see `_check_charsmap`.
_BLOCK = 256


class InvalidPieces(ValueError):
    """Not a SentencePiece model file, or one that the libraries could not run."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """texts: of each piece, in the order of their ids. unknown: the id of the one that stands for all others.

    unigram: whether pieces are chosen by their scores, not by merges."""

    texts: tuple[str, ...]
    unknown: int
    unigram: bool


def read(content: bytes) -> Pieces:
    """Raises InvalidPieces."""
    texts: list[str] = []
    unknown: list[int] = []
    unigram = True
    left = iter(range(MAX_FIELDS))
    for number, value in _fields(content, left):
        if number == _PIECE:
            text, type_ = _piece(_bytes(value), left)
            if type_ == _UNKNOWN:
                unknown.append(len(texts))
            texts.append(text)
        elif number == _TRAINER:
            for inner, said in _fields(_bytes(value), left):
                unigram = said == _UNIGRAM if inner == _MODEL_TYPE else unigram
        elif number in (_NORMALIZER, _DENORMALIZER):
            for inner, said in _fields(_bytes(value), left):
                if inner == _CHARSMAP and said:
                    _check_charsmap(_bytes(said))
    if not 1 <= len(texts) <= MAX_PIECES:
        raise InvalidPieces("it has no pieces, or too many")
    if len(set(texts)) != len(texts):
        raise InvalidPieces("a piece occurs twice")
    if len(unknown) != 1:
        raise InvalidPieces("not one piece stands for what is unknown")
    return Pieces(tuple(texts), unknown[0], unigram)


def _piece(message: bytes, left: Iterator[int]) -> tuple[str, int]:
    """Its text and its type."""
    text, type_ = "", 1
    for number, value in _fields(message, left):
        if number == _TEXT:
            try:
                text = _bytes(value).decode()
            except UnicodeDecodeError as error:
                raise InvalidPieces("a piece is not UTF-8") from error
        elif number == _SCORE and not math.isfinite(struct.unpack("<f", _bytes(value, 4))[0]):
            raise InvalidPieces("a score is not finite")
        elif number == _TYPE:
            type_ = value if isinstance(value, int) else 0
    if not text or "\0" in text or type_ not in _TYPES:
        raise InvalidPieces("a piece without a text, or of an unknown type")
    if type_ == _BYTE and not _BYTE_TEXT.fullmatch(text):
        raise InvalidPieces("a piece for a byte does not say which")
    return text, type_


def _check_charsmap(blob: bytes) -> None:
    """Replaced characters: the size of a trie, the trie (Darts, a double array of 32-bit units), and the strings that
    its values are places in, each ended by a zero byte.

    From a unit at place p one goes on to p ^ offset ^ byte. The array is a multiple of 256 units long, so that this
    lies within it wherever p ^ offset does.
    """
    size = int.from_bytes(blob[:4], "little")
    strings = blob[4 + size :]
    if size == 0 or size % (4 * _BLOCK) or not strings or strings[-1]:
        raise InvalidPieces("the table of replaced characters is cut or broken")
    units = np.frombuffer(blob, "<u4", size // 4, 4)
    leaves = units >> 31 == 1
    following = np.arange(len(units), dtype=np.uint32) ^ ((units >> 10) << ((units & (1 << 9)) >> 6))
    inner = following[~leaves]
    ends = following[~leaves & (units >> 8 & 1 == 1)]
    if (inner >= len(units)).any() or not leaves[ends].all():
        raise InvalidPieces("the table of replaced characters leads out of itself")
    places = units[leaves] & 0x7FFFFFFF
    if (places >= len(strings)).any() or (np.frombuffer(strings, "u1")[places] & 0xC0 == 0x80).any():
        raise InvalidPieces("the table of replaced characters leads out of its strings, or between two bytes of one")
    try:
        strings.decode()
    except UnicodeDecodeError as error:
        raise InvalidPieces("a replaced character is not UTF-8") from error


def _bytes(value: int | bytes, length: int | None = None) -> bytes:
    if isinstance(value, int) or (length is not None and len(value) != length):
        raise InvalidPieces("a field is of another type")
    return value


def _fields(message: bytes, left: Iterator[int]) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field: a number, or bytes. left: as many as the file may still have."""
    place, end = 0, len(message)
    while place < end:
        if next(left, None) is None:
            raise InvalidPieces("it has more fields than any model")
        key, place = _varint(message, place)
        number, kind = key >> 3, key & 7
        if number == 0 or kind not in (_VARINT, _EIGHT, _BYTES, _FOUR):
            raise InvalidPieces("it is not in protobuf's format")
        if kind == _VARINT:
            value, place = _varint(message, place)
            yield number, value
            continue
        length = {_EIGHT: 8, _FOUR: 4}.get(kind)
        if length is None:
            length, place = _varint(message, place)
        if length > end - place:
            raise InvalidPieces("it ends in the middle")
        yield number, message[place : place + length]
        place += length


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(message):
            raise InvalidPieces("it ends in the middle")
        byte = message[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise InvalidPieces("it is not in protobuf's format")
