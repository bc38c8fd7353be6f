"""How far the reading process is in its file: a number that it keeps where its parent can see it.

It tells of places in the file alone, as bytes; never of rows, which may be private.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, BinaryIO

_BYTES = 8
#: The number is written when it has grown by so much of the whole, no oftener.
_STEPS = 1000
_BUFFER = 2**17


class Progress:
    """Of one file. Nothing is told before `start`."""

    def __init__(self) -> None:
        self._source: Path | None = None
        self._size = self._told = 0
        self._begins, self._ends = 0.0, 1.0
        self._told_in = -1

    def start(self, told_in: Path, size: int) -> None:
        """told_in: a path to write to; size: bytes of the file as it was uploaded."""
        self._told_in, self._size, self._told = os.open(told_in, os.O_WRONLY | os.O_CREAT, 0o600), size, 0

    def follow(self, source: Path, begins: float = 0.0, ends: float = 1.0) -> None:
        """The file whose bytes count: the uploaded one, or what it was unpacked to. begins, ends: of all that is to do,
        what has been done before it and after."""
        self._source, self._begins, self._ends = source, begins, ends

    def at(self, source: Path, share: float, reading: int = 0, readings: int = 1) -> None:
        """So far is a reading of the file, the first of them being 0. Of other files nothing is told."""
        if self._told_in < 0 or source != self._source:
            return
        done = self._begins + (self._ends - self._begins) * min((reading + share) / readings, 1.0)
        reached = int(self._size * done)
        if reached - self._told >= self._size / _STEPS or reached == self._size > self._told:
            self._told = reached
            os.pwrite(self._told_in, reached.to_bytes(_BYTES, "little"), 0)


#: A process reads one file.
progress = Progress()


def told(path: Path) -> int:
    """Bytes that the process has read so far; 0 before it says a number."""
    try:
        return int.from_bytes(path.read_bytes()[:_BYTES], "little")
    except FileNotFoundError:
        return 0


def open_followed(path: Path, reading: int = 0, readings: int = 1) -> BinaryIO:
    """The file's bytes; reading them is told."""
    return io.BufferedReader(_Followed(path, reading, readings), _BUFFER)


class _Followed(io.FileIO):
    def __init__(self, path: Path, reading: int, readings: int) -> None:
        super().__init__(path)
        self._source, self._reading, self._readings = path, reading, readings
        self._size, self._read = max(path.stat().st_size, 1), 0

    def readinto(self, buffer: Any, /) -> int:
        count = super().readinto(buffer)
        self._read += count
        progress.at(self._source, self._read / self._size, self._reading, self._readings)
        return count
