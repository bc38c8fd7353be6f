"""JSON lines: an object a line. Text stays text; numbers, booleans, lists and objects become their JSON.

Columns are the keys, in the order in which they first appear; a key that an object lacks is a missing cell.
Read by Python's own parser: it tells line and column of a mistake, which DuckDB's does not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import duckdb

from app.files.formats.interface import Column, ColumnType, Format, Table, check_names, lines_of, stream
from app.files.limits import MAX_COLUMNS, MAX_ROW_BYTES
from app.files.problems import ReadError


def _open(connection: duckdb.DuckDBPyConnection, path: Path) -> Table:
    # Twice over the file: the first reading checks every line and learns the columns, the second hands on the rows.
    kinds: dict[str, set[ColumnType]] = {}
    for line, row in _objects(path):
        for name, value in row.items():
            if name not in kinds:
                if len(kinds) == MAX_COLUMNS:
                    raise ReadError("too_many_columns", line=line)
                kinds[name] = set()
                check_names(kinds, line=line)
            if value is not None:
                kinds[name].add(_kind(value))
    columns = tuple(Column(name, _merged(found)) for name, found in kinds.items())
    if not columns:
        raise ReadError("no_rows")
    cells = ([_text(row.get(column.name)) for column in columns] for _, row in _objects(path))
    return Table(columns, (stream(connection, columns, cells),), lambda rows: lines_of(_objects(path), rows))


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every object with its line; blank lines are skipped."""
    with path.open("rb") as file:
        line = 0
        while data := file.readline(MAX_ROW_BYTES + 1):
            line += 1
            if len(data) > MAX_ROW_BYTES:
                raise ReadError("row_too_long", line=line)
            try:
                text = data.decode("utf-8-sig" if line == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise ReadError("undecodable_bytes", line=line, column=error.start + 1) from None
            if text:
                yield line, _object(text, line)


def _object(text: str, line: int) -> dict[str, Any]:
    try:
        row = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except OverflowError:
        raise ReadError("number_not_finite", line=line) from None
    except json.JSONDecodeError as error:
        raise ReadError("invalid_json", line=line, column=error.colno) from None
    except (ValueError, RecursionError):  # NaN and Infinity, numbers of thousands of digits, nesting without end
        raise ReadError("invalid_json", line=line) from None
    if not isinstance(row, dict):
        raise ReadError("not_an_object", line=line)
    if "\\u" in text and not _encodable(row):
        raise ReadError("undecodable_bytes", line=line)
    return row


def _encodable(row: dict[str, Any]) -> bool:
    """False where an escape wrote half of a surrogate pair, which is no character."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_constant(_name: str) -> NoReturn:
    raise ValueError("not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise OverflowError
    return number


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _kind(value: Any) -> ColumnType:
    match value:
        case str():
            return "string"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case _:
            return "json"


def _merged(kinds: set[ColumnType]) -> ColumnType:
    if len(kinds) <= 1:
        return next(iter(kinds), "string")
    return "number" if kinds == {"integer", "number"} else "mixed"


JSONL = Format(
    name="jsonl",
    suffixes=(".jsonl", ".ndjson"),
    content_type="application/jsonl",
    sniff_order=2,
    sniff=lambda beginning: beginning.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"),
    open=_open,
)
