"""JSON: one array of objects, an object at a time. What its columns become: `app.files.formats.objects`.

A `.json` file that begins with an object is read as JSON lines: many tools call those so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import duckdb

from app.files.formats.interface import Format, Table
from app.files.formats.jsonl import open_lines
from app.files.formats.objects import READINGS, Objects, check_object, decoder, open_objects
from app.files.formats.text import open_text, undecodable
from app.files.limits import MAX_ROW_BYTES
from app.files.problems import ReadError

_PIECE = 2**16
_SPACE = re.compile(r"[ \t\n\r]*")
#: A mistake so near to the end of what was read may be none: the value could go on. Longer than any literal or escape.
_NEAR = 16


def _open(connection: duckdb.DuckDBPyConnection, path: Path, scratch: Path) -> Table:
    with open_text(path, 0, READINGS) as file:
        try:
            begins_with_object = _Text(file).peek() == "{"
        except UnicodeDecodeError:
            raise undecodable(path) from None
    if begins_with_object:
        return open_lines(connection, path, scratch)
    return open_objects(connection, partial(_objects, path), _no_lines)


def _no_lines(rows: Collection[int]) -> Mapping[int, int]:
    """An array is often one line: rows say more."""
    return {}


def _objects(path: Path, reading: int) -> Objects:
    """Every object of the array with its line. ReadError with line, column and row."""
    with open_text(path, reading, READINGS) as file:
        text = _Text(file)
        try:
            yield from _elements(text)
        except UnicodeDecodeError:
            raise undecodable(path) from None


def _elements(text: _Text) -> Objects:
    text.take("[")
    row = 1
    if text.peek() != "]":
        while True:
            text.peek()
            line = text.line
            value, source = text.value(row)
            yield line, check_object(value, source, line=line, row=row)
            if text.peek() == "]":
                break
            text.take(",", row)
            row += 1
    text.take("]", row)
    if text.peek():
        raise text.error("invalid_json", text.position, row)


class _Text:
    """A window on the file: what is before `position` is read, and forgotten in pieces."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._buffer, self._ended = file, "", False
        self._decode = decoder().raw_decode
        self._forgotten = 0  # characters of the current line that are no longer in the buffer
        self.position, self.line = 0, 1

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            match = _SPACE.match(self._buffer, self.position)
            assert match is not None  # it may be empty
            self._advance(match.end())
            if self.position < len(self._buffer) or not self._more(_PIECE):
                return self._buffer[self.position : self.position + 1]

    def take(self, character: str, row: int | None = None) -> None:
        """Moves over this character; ReadError where another one is next."""
        if self.peek() != character:
            raise self.error("invalid_json", self.position, row)
        self._advance(self.position + 1)

    def value(self, row: int) -> tuple[Any, str]:
        """The next value, and its text."""
        while True:
            try:
                value, end = self._decode(self._buffer, self.position)
            except json.JSONDecodeError as error:
                unfinished = error.pos >= len(self._buffer) - _NEAR or error.msg.startswith("Unterminated string")
                if unfinished and len(self._buffer) - self.position > MAX_ROW_BYTES:
                    raise ReadError("row_too_long", line=self.line, row=row) from None
                if unfinished and self._more(max(_PIECE, len(self._buffer) - self.position)):
                    continue
                raise self.error("invalid_json", error.pos, row) from None
            except OverflowError:
                raise ReadError("number_not_finite", line=self.line, row=row) from None
            except (ValueError, RecursionError):  # NaN, numbers of thousands of digits, nesting without end
                raise ReadError("invalid_json", line=self.line, row=row) from None
            if end == len(self._buffer) and self._more(_PIECE):
                continue  # a number may go on
            if end - self.position > MAX_ROW_BYTES:
                raise ReadError("row_too_long", line=self.line, row=row)
            source = self._buffer[self.position : end]
            self._advance(end)
            return value, source

    def error(self, code: str, position: int, row: int | None) -> ReadError:
        """At this position of the buffer."""
        line = self.line + self._buffer.count("\n", self.position, position)
        newline = self._buffer.rfind("\n", 0, position)
        column = position - newline + (self._forgotten if newline < 0 else 0)
        return ReadError(code, line=line, column=column, row=row)

    def _advance(self, position: int) -> None:
        self.line += self._buffer.count("\n", self.position, position)
        self.position = position

    def _more(self, characters: int) -> bool:
        """Reads on, and forgets what was read before: positions of the buffer change. False, and they stay, at the
        file's end."""
        text = "" if self._ended else self._file.read(characters)
        if not text:
            self._ended = True
            return False
        newline = self._buffer.rfind("\n", 0, self.position)
        self._forgotten = self.position - newline - 1 if newline >= 0 else self._forgotten + self.position
        self._buffer, self.position = self._buffer[self.position :] + text, 0
        return True


JSON = Format(
    name="json",
    suffixes=(".json",),
    content_type="application/json",
    sniff_order=2,
    sniff=lambda beginning: beginning.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["),
    open=_open,
)
