"""Text files, read as UTF-8 in bounded pieces."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from app.files.limits import MAX_ROW_BYTES
from app.files.problems import ReadError
from app.files.progress import open_followed

_PIECE = 2**20


def open_text(path: Path, reading: int = 0, readings: int = 1) -> TextIO:
    """Without its byte order mark, with its line ends as they are. Reading raises UnicodeDecodeError: `undecodable`.

    reading: which one of how many this is, see `app.files.progress`.
    """
    return io.TextIOWrapper(open_followed(path, reading, readings), encoding="utf-8-sig", newline="")


def lines_within_limits(file: TextIO) -> Iterator[str]:
    """The file's lines; ReadError instead of one that would fill the memory."""
    number = 0
    while text := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(text) > MAX_ROW_BYTES:
            raise ReadError("row_too_long", line=number)
        yield text


def undecodable(path: Path) -> ReadError:
    """The decoder reads ahead of the rows: which line it met is looked up."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with path.open("rb") as file:
        try:
            while data := file.read(_PIECE):
                line += decoder.decode(data).count("\n")
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            line += error.object.count(b"\n", 0, error.start)
    return ReadError("undecodable_bytes", line=line)
