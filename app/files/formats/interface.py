"""What a format must offer: SQL that DuckDB reads the rows by, and the way back from a row to its line."""

# ruff: noqa: S608 - names are quoted, and the database is this process's own memory

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import duckdb
import pyarrow as pa

from app.files.limits import MAX_COLUMN_NAME, MAX_COLUMNS
from app.files.problems import ReadError

#: What a column's cells hold. All but images are text in the canonical rows: `json` is lists or objects as JSON, and
#: `mixed` what has no one type. An `image` is the bytes of a PNG or JPEG (`app.files.formats.images`).
ColumnType = Literal["string", "integer", "number", "boolean", "json", "mixed", "image"]

_BATCH_ROWS, _BATCH_CHARACTERS = 10_000, 2**22


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the dataset."""

    name: str
    type: ColumnType


@dataclass(frozen=True, slots=True)
class Reading:
    """One way to read the rows.

    query: a SELECT of all columns under their names, images as bytes and all else as text, in the file's order of
      rows; it can run once.
    problem: asked after the query has run; what ended it, or None.
    """

    query: str
    problem: Callable[[], ReadError | None]


@dataclass(frozen=True, slots=True)
class Table:
    """A dataset that is ready to be read.

    readings: several where the format has dialects that only reading tells apart: the first that reads every row is
    right. lines: the line on which each of these rows (from 1) begins; empty where the format has no lines.
    has_header: the names were the first line, which could be a row in truth.
    """

    columns: tuple[Column, ...]
    readings: tuple[Reading, ...]
    lines: Callable[[Collection[int]], Mapping[int, int]]
    has_header: bool = False


@dataclass(frozen=True, slots=True)
class Format:
    """sniff: whether a file that begins so looks like this format; formats are asked by ascending sniff_order.
    open(connection, file, scratch): ReadError for what is wrong before the rows; scratch: a folder for what must lie
    in a file on the way."""

    name: str
    suffixes: tuple[str, ...]
    content_type: str
    sniff_order: int
    sniff: Callable[[bytes], bool]
    open: Callable[[duckdb.DuckDBPyConnection, Path, Path], Table]


def stream(
    connection: duckdb.DuckDBPyConnection, columns: Sequence[Column], rows: Iterable[Sequence[str | bytes | None]]
) -> Reading:
    """A reading of rows that Python yields, batch by batch, never all at once."""
    schema = pa.schema([(column.name, pa.binary() if column.type == "image" else pa.string()) for column in columns])

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in _batched(rows):
            cells = zip(*batch, strict=True)
            arrays = [pa.array(column, field.type) for column, field in zip(cells, schema, strict=True)]
            yield pa.record_batch(arrays, schema)

    return arrow_stream(connection, schema, batches(), [identifier(column.name) for column in columns])


def arrow_stream(
    connection: duckdb.DuckDBPyConnection, schema: pa.Schema, batches: Iterable[pa.RecordBatch], cells: Sequence[str]
) -> Reading:
    """A reading of Arrow batches of that schema. cells: for each column, what SELECT makes of it."""
    failures: list[ReadError] = []

    def kept() -> Iterator[pa.RecordBatch]:
        # An exception would reach DuckDB as a text: it is kept here, and the stream ends.
        try:
            yield from batches
        except ReadError as error:
            failures.append(error)
        except MemoryError:
            failures.append(ReadError("limits_exceeded"))

    name = f"rows_{id(failures)}"
    connection.register(name, pa.RecordBatchReader.from_batches(schema, kept()))
    return Reading(f"SELECT {', '.join(cells)} FROM {name}", lambda: failures[0] if failures else None)


def _batched(rows: Iterable[Sequence[str | bytes | None]]) -> Iterator[list[Sequence[str | bytes | None]]]:
    batch: list[Sequence[str | bytes | None]] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += sum(map(len, filter(None, row)))
        if len(batch) == _BATCH_ROWS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def lines_of(numbered: Iterable[tuple[int, object]], rows: Collection[int]) -> Mapping[int, int]:
    """From all rows with their lines, those of the wanted rows (from 1); read only as far as they reach."""
    found: dict[int, int] = {}
    for row, (line, _) in enumerate(numbered, start=1):
        if row in rows:
            found[row] = line
            if len(found) == len(rows):
                break
    return found


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
