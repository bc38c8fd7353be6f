"""What a format must offer: SQL that DuckDB reads the rows by, and the way back from a row to its line."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import duckdb

from app.files.limits import MAX_COLUMN_NAME, MAX_COLUMNS
from app.files.problems import ReadError

#: What a column held before it became text.
ColumnType = Literal["string", "integer", "number", "boolean", "json", "mixed"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the dataset."""

    name: str
    type: ColumnType


@dataclass(frozen=True, slots=True)
class Table:
    """A dataset that is ready to be read.

    queries: SELECTs of all columns as text under their names, in the file's order of rows; several where the format
    has dialects that only reading tells apart: the first one that reads every row is right.
    problem: asked after a query has run; what it met, or None.
    lines: the line on which each of these rows (from 1) begins; empty where the format has no lines.
    has_header: the names were the first line, which could be a row in truth.
    """

    columns: tuple[Column, ...]
    queries: tuple[str, ...]
    problem: Callable[[], ReadError | None]
    lines: Callable[[Collection[int]], Mapping[int, int]]
    has_header: bool = False


@dataclass(frozen=True, slots=True)
class Format:
    """sniff: whether a file that begins so looks like this format; formats are asked by ascending sniff_order.
    open: opens a file; ReadError for what is wrong before the rows."""

    name: str
    suffixes: tuple[str, ...]
    content_type: str
    sniff_order: int
    sniff: Callable[[bytes], bool]
    open: Callable[[duckdb.DuckDBPyConnection, Path], Table]


def check_names(names: Collection[str], *, line: int | None = None, code: str = "column_name_invalid") -> None:
    """ReadError where these cannot name columns; `code` for a name that is none."""
    if len(names) > MAX_COLUMNS:
        raise ReadError("too_many_columns", line=line)
    seen: set[str] = set()
    for position, name in enumerate(names, start=1):
        if not 0 < len(name) <= MAX_COLUMN_NAME or not name.isprintable():
            raise ReadError(code, line=line, column=position)
        if name.casefold() in seen:  # SQL compares names without case
            raise ReadError("duplicate_column", line=line, column=position)
        seen.add(name.casefold())


def identifier(name: str) -> str:
    """Quoted for SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str | Path) -> str:
    """Quoted for SQL."""
    return "'" + str(text).replace("'", "''") + "'"
