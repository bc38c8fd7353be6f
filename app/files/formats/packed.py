"""Compressed files: gzip and Zstandard, unpacked into the reader's folder before they are read.

What they unpack to is bounded, see `app.files.limits.max_unpacked_bytes`; what follows their end is refused.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from app.files.limits import max_unpacked_bytes
from app.files.problems import ReadError
from app.files.progress import open_followed, progress

_PIECE = 2**20
#: What unpacking is told to be of all that is to do with a file; of the time for CSV it takes less.
UNPACKING = 0.05
_ZIP = b"PK\x03\x04"


#: RFC 8878 has 16 numbers for frames to be skipped, with which some tools begin (pzstd), each before the same bytes.
_SKIPPED = tuple(bytes([first]) + b"\x2a\x4d\x18" for first in range(0x50, 0x60))


@dataclass(frozen=True, slots=True)
class _Codec:
    suffixes: tuple[str, ...]
    magic: tuple[bytes, ...]
    open: Callable[[BinaryIO], BinaryIO]


_CODECS = (
    _Codec((".gz", ".gzip"), (b"\x1f\x8b",), lambda file: cast(BinaryIO, gzip.open(file, "rb"))),
    # Zstandard's own library, by way of pyarrow; the window that a frame asks for is bounded by it.
    _Codec(
        (".zst", ".zstd"),
        (b"\x28\xb5\x2f\xfd", *_SKIPPED),
        lambda file: cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(file), "zstd")),
    ),
)


def is_packed(beginning: bytes) -> bool:
    """Whether a file that begins so is compressed."""
    return any(beginning.startswith(codec.magic) for codec in _CODECS)


def unpacked(source: Path, filename: str, folder: Path) -> tuple[Path, str]:
    """The file as it is, or unpacked in the folder, with its name then: what `progress` follows from here on.

    ReadError: invalid_compression, unpacks_too_large, nested_archive.
    """
    with source.open("rb") as file:
        beginning = file.read(4)
    suffix = Path(filename).suffix.lower()
    codec = next((each for each in _CODECS if beginning.startswith(each.magic)), None)
    if codec is None:
        if beginning and any(suffix in each.suffixes for each in _CODECS):
            raise ReadError("invalid_compression")
        progress.follow(source)
        return source, filename
    target = folder / "unpacked"
    progress.follow(source, ends=UNPACKING)
    _unpack(codec, source, target)
    progress.follow(target, begins=UNPACKING)
    with target.open("rb") as file:
        beginning = file.read(4)
    if beginning.startswith(_ZIP) or is_packed(beginning):
        raise ReadError("nested_archive")
    return target, Path(filename).stem if suffix in codec.suffixes else filename


def _unpack(codec: _Codec, source: Path, target: Path) -> None:
    left = max_unpacked_bytes(source.stat().st_size)
    with open_followed(source) as file, codec.open(file) as packed, target.open("wb") as out:
        while data := _read(packed):
            left -= len(data)
            if left < 0:
                raise ReadError("unpacks_too_large")
            out.write(data)


def _read(packed: BinaryIO) -> bytes:
    try:
        return packed.read(_PIECE)
    except MemoryError:
        raise
    except (OSError, EOFError, zlib.error, pa.ArrowException, ValueError):
        raise ReadError("invalid_compression") from None
