"""Datasets of JSON objects: columns are their keys, in the order in which they first appear.

Text stays text; numbers, booleans, lists and objects become their JSON. A key that an object lacks is a missing cell.
Read by Python's own parser: it tells line and column of a mistake, which DuckDB's does not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NoReturn

import duckdb

from app.files.formats.interface import Column, ColumnType, Table, check_names, stream
from app.files.limits import MAX_COLUMNS
from app.files.problems import ReadError

READINGS = 2

#: Objects with the line that each begins on.
Objects = Iterator[tuple[int, dict[str, Any]]]


def open_objects(
    connection: duckdb.DuckDBPyConnection,
    objects: Callable[[int], Objects],
    lines: Callable[[Collection[int]], Mapping[int, int]],
) -> Table:
    """The table of these objects, which are read READINGS times: first every one is checked and the columns are learnt,
    then the rows are handed on. objects: asked with the number of the reading, from 0."""
    kinds: dict[str, set[ColumnType]] = {}
    for line, row in objects(0):
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
    cells = ([_text(row.get(column.name)) for column in columns] for _, row in objects(1))
    return Table(columns, (stream(connection, columns, cells),), lines)


def decoder() -> json.JSONDecoder:
    """Of JSON as its standard has it: ValueError for NaN and Infinity, OverflowError for a number that is too large."""
    return json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)


def check_object(value: Any, text: str, **place: int) -> dict[str, Any]:
    """The value that was read from this text. ReadError, with the place, where it is no object, or half a character."""
    if not isinstance(value, dict):
        raise ReadError("not_an_object", **place)
    if "\\u" in text and not _encodable(value):
        raise ReadError("undecodable_bytes", **place)
    return value


def to_json(value: Any) -> str:
    """Canonical JSON text."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _encodable(row: dict[str, Any]) -> bool:
    """False where an escape wrote half of a surrogate pair, which is no character."""
    try:
        to_json(row).encode()
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
    return value if value is None or isinstance(value, str) else to_json(value)


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
