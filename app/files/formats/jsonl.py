"""JSON lines: an object a line. What its columns become: `app.files.formats.objects`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import duckdb

from app.files.formats.interface import Format, Table, lines_of
from app.files.formats.objects import READINGS, Objects, check_object, decoder, open_objects
from app.files.limits import MAX_ROW_BYTES
from app.files.problems import ReadError
from app.files.progress import open_followed


def open_lines(connection: duckdb.DuckDBPyConnection, path: Path, scratch: Path) -> Table:
    """The table of a file that has an object on each line."""
    return open_objects(connection, partial(_objects, path), lambda rows: lines_of(_objects(path), rows))


def _objects(path: Path, reading: int = READINGS) -> Objects:
    """Every object with its line; blank lines are skipped."""
    decode = decoder().decode
    with open_followed(path, reading, READINGS) as file:
        line = 0
        while data := file.readline(MAX_ROW_BYTES + 1):
            line += 1
            if len(data) > MAX_ROW_BYTES:
                raise ReadError("row_too_long", line=line)
            try:
                text = data.decode("utf-8-sig" if line == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise ReadError("undecodable_bytes", line=line, column=error.start + 1) from None
            if not text:
                continue
            try:
                row = decode(text)
            except json.JSONDecodeError as error:
                raise ReadError("invalid_json", line=line, column=error.colno) from None
            except OverflowError:
                raise ReadError("number_not_finite", line=line) from None
            except (ValueError, RecursionError):  # NaN, numbers of thousands of digits, nesting without end
                raise ReadError("invalid_json", line=line) from None
            yield line, check_object(row, text, line=line)


JSONL = Format(
    name="jsonl",
    suffixes=(".jsonl", ".ndjson"),
    content_type="application/jsonl",
    sniff_order=2,
    sniff=lambda beginning: beginning.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"),
    open=open_lines,
)
