"""A bundle as one archive, tar or zip, that is never stored: frames of our own around the stored files.

An archive is frame, file, frame, file, …, frame. All frames follow from the files' list, so the archive's length is
known, any range of it is read from the files' own ranges, and equal bundles give equal bytes. Its SHA-256 is computed
once, when the bundle is published. A new format is a function and a line in FORMATS.
"""

from __future__ import annotations

import hashlib
import struct
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: What {path, bytes, crc32} of a bundle's file is called here.
Entry = Mapping[str, Any]

#: The folder that an archive unpacks to.
FOLDER = "model"

_BLOCK = 512
_RECORD = 20 * _BLOCK

#: Where zip's 32-bit fields end and ZIP64's begin.
_MAX_32 = 0xFFFFFFFF
#: 1 January 1980 in MS-DOS form, the earliest that zip knows; UTF-8 names; made on Unix, -rw-r--r--.
_DOS_DATE, _UTF8, _MADE_BY, _MODE = 0x21, 0x800, 3 << 8, 0o100644 << 16


@dataclass(frozen=True, slots=True)
class ArchiveFormat:
    """frames: one before each file, and one after the last."""

    media_type: str
    frames: Callable[[Sequence[Entry]], list[bytes]]


def _tar_frames(files: Sequence[Entry]) -> list[bytes]:
    """POSIX tar: a header block before each file, zeros to a whole block after it, two blocks and a whole record."""
    frames, padding, total = [], b"", 0
    for file in files:
        info = tarfile.TarInfo(f"{FOLDER}/{file['path']}")
        info.size = file["bytes"]
        info.mode = 0o644
        header = info.tobuf(tarfile.GNU_FORMAT)  # its base-256 sizes carry files over 8 GiB
        frames.append(padding + header)
        padding = bytes(-file["bytes"] % _BLOCK)
        total += len(header) + file["bytes"] + len(padding)
    total += 2 * _BLOCK
    return [*frames, padding + bytes(2 * _BLOCK) + bytes(-total % _RECORD)]


def _zip_frames(files: Sequence[Entry]) -> list[bytes]:
    """Zip without compression (weights do not compress), ZIP64 where a size or a place needs it (APPNOTE 6.3.10)."""
    frames, directory, offset = [], b"", 0
    for file in files:
        name, size = f"{FOLDER}/{file['path']}".encode(), file["bytes"]
        large = size >= _MAX_32
        extra = struct.pack("<HHQQ", 1, 16, size, size) if large else b""
        shown = _MAX_32 if large else size
        version = 45 if large else 20
        fields = (_UTF8, 0, 0, _DOS_DATE, file["crc32"], shown, shown, len(name))
        header = struct.pack("<4sHHHHHIIIHH", b"PK\3\4", version, *fields, len(extra)) + name + extra

        far = offset >= _MAX_32
        values = ([size, size] if large else []) + ([offset] if far else [])
        central_extra = struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""
        version = 45 if values else 20
        directory += struct.pack(
            "<4sHHHHHHIIIHHHHHII",
            b"PK\1\2",
            _MADE_BY | version,
            version,
            *fields,
            len(central_extra),
            0,
            0,
            0,
            _MODE,
            _MAX_32 if far else offset,
        )
        directory += name + central_extra
        frames.append(header)
        offset += len(header) + size

    end = b""
    if len(files) >= 0xFFFF or offset >= _MAX_32 or len(directory) >= _MAX_32:
        counts = (len(files), len(files), len(directory), offset)
        end += struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, _MADE_BY | 45, 45, 0, 0, *counts)
        end += struct.pack("<4sIQI", b"PK\6\7", 0, offset + len(directory), 1)
    number = min(len(files), 0xFFFF)
    place = (min(len(directory), _MAX_32), min(offset, _MAX_32))
    end += struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, number, number, *place, 0)
    return [*frames, directory + end]


FORMATS: dict[str, ArchiveFormat] = {
    "tar": ArchiveFormat("application/x-tar", _tar_frames),
    "zip": ArchiveFormat("application/zip", _zip_frames),
}


def describe(files: Sequence[Entry], reader: Callable[[str], Iterator[bytes]]) -> dict[str, dict[str, Any]]:
    """Length and SHA-256 of the archive in every format; each file is read once.

    reader: a file's bytes by its path. Raises ValueError where a file's length is not what its entry says.
    """
    frames = {name: format_.frames(files) for name, format_ in FORMATS.items()}
    digests = {name: hashlib.sha256() for name in FORMATS}
    for number, file in enumerate(files):
        for name, digest in digests.items():
            digest.update(frames[name][number])
        length = 0
        for chunk in reader(file["path"]):
            length += len(chunk)
            for digest in digests.values():
                digest.update(chunk)
        if length != file["bytes"]:
            raise ValueError("a bundle's file is not as long as it was")
    for name, digest in digests.items():
        digest.update(frames[name][-1])
    content = sum(file["bytes"] for file in files)
    return {
        name: {"bytes": sum(map(len, frames[name])) + content, "sha256": digest.hexdigest()}
        for name, digest in digests.items()
    }


def read(
    format_: str, files: Sequence[Entry], start: int, end: int, read_file: Callable[[str, int, int], Iterator[bytes]]
) -> Iterator[bytes]:
    """Bytes start (included) to end (excluded) of the archive. read_file: a range of a file, by its path."""
    frames = FORMATS[format_].frames(files)
    place = 0
    for number, frame in enumerate(frames):
        first, last = max(start - place, 0), min(end - place, len(frame))
        if first < last:
            yield frame[first:last]
        place += len(frame)
        if number < len(files):
            size = files[number]["bytes"]
            first, last = max(start - place, 0), min(end - place, size)
            if first < last:
                yield from read_file(files[number]["path"], first, last)
            place += size
