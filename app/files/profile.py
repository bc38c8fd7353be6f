"""What is known of the canonical rows: columns with their facts, and the privacy units. All of it from private rows.

Facts of a column: name, type; distinct (up to MAX_CLASSES, else null); classes, its values where they are few and
short (else null); lists, where every cell is a list of strings, or each one of integers (labels, tags), a digest of how
long they are, by which columns are compared (else null); unequal, by another such column the place of the first row in
which its list is longer or shorter; list_items, which of them: `strings` or `integers`; elements, what is in these
lists, as text, where it is few and short; chat, {holds, invalid} where the first cell is a chat or
tools in OpenAI's format: which of them, and code and place of the first cell that is not (null: none); range,
[smallest, largest] where every cell is a finite decimal number, in whatever type; nulls: {count, row, line} with the
place of the first missing cell.
An image column has only its nulls.
"""

# ruff: noqa: S608 - names are quoted, and the database is this process's own memory

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import duckdb

from app.catalog.chat_format import READERS, InvalidChat, looks_like
from app.files.formats.interface import Column, Table, identifier, literal
from app.files.limits import MAX_CELL_BYTES, MAX_CLASS_LENGTH, MAX_CLASSES, MAX_RECORDS_PER_UNIT, MAX_ROWS
from app.files.problems import ReadError

#: A decimal number as any parser reads it.
NUMBER = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
_CELLS_AT_ONCE = 1024

#: Columns of lists, the first of the file, that are compared to each other cell by cell.
_COMPARED = 4


def profile(connection: duckdb.DuckDBPyConnection, table: Table, rows: Path, most: int) -> dict[str, Any]:
    """{num_rows, columns}. most: bytes that a column may have. ReadError for rows that are none."""
    counted = connection.execute(f"SELECT count(*) FROM read_parquet({literal(rows)})").fetchone()
    num_rows = counted[0] if counted else 0
    if num_rows == 0:
        raise ReadError("no_rows")
    if num_rows > MAX_ROWS:
        raise ReadError("too_many_rows")
    columns = [_column(connection, column, n, table, rows, most) for n, column in enumerate(table.columns, start=1)]
    places = [column["nulls"] for column in columns]
    places += [column["chat"]["invalid"] for column in columns if (column["chat"] or {}).get("invalid")]
    places += _compare(connection, rows, columns)
    rows_of_interest = {place["row"] for place in places if place["row"] is not None}
    lines = table.lines(rows_of_interest) if rows_of_interest else {}
    for place in places:
        place["line"] = lines.get(place["row"])
    return {"num_rows": num_rows, "columns": columns}


def units(
    connection: duckdb.DuckDBPyConnection, table: Table, rows: Path, unit_column: str | None, num_rows: int
) -> dict[str, Any]:
    """How many privacy units there are, and how many records they have. ReadError for a row that is nobody's."""
    if unit_column is None:
        return {"num_units": num_rows, "records_per_unit": [[1, num_rows, num_rows]]}
    values = f"(SELECT {identifier(unit_column)} AS unit FROM read_parquet({literal(rows)}))"
    # Letters that look like no letter would let one person pass for two, each with half the protection.
    found = connection.execute(
        f"SELECT min(place) FILTER (unit IS NULL OR unit = ''), min(place) FILTER (regexp_matches(unit, ?)) "
        f"FROM (SELECT unit, row_number() OVER () AS place FROM {values})",
        [r"^[\s\p{Z}]|[\s\p{Z}]$"],
    ).fetchone()
    assert found is not None  # an aggregate has one row
    position = [column.name for column in table.columns].index(unit_column) + 1
    for code, row in zip(("unit_missing", "unit_padded"), found, strict=True):
        if row is not None:
            raise _at(code, table, row, position)
    counts = connection.execute(
        f"SELECT least(records, {MAX_RECORDS_PER_UNIT}) AS most, count(*), CAST(sum(records) AS BIGINT) "
        f"FROM (SELECT count(*) AS records FROM {values} GROUP BY unit) GROUP BY most ORDER BY most"
    ).fetchall()
    return {"num_units": sum(units for _, units, _ in counts), "records_per_unit": [list(entry) for entry in counts]}


def _column(
    connection: duckdb.DuckDBPyConnection, column: Column, position: int, table: Table, rows: Path, most: int
) -> dict[str, Any]:
    # The canonical rows are read in their order, so that row_number() counts as the file does.
    values = (
        f"(SELECT {identifier(column.name)} AS cell, row_number() OVER () AS place FROM read_parquet({literal(rows)}))"
    )
    facts: dict[str, Any] = {"name": column.name, "type": column.type}
    facts |= dict.fromkeys(("distinct", "classes", "lists", "unequal", "list_items", "elements", "chat", "range"))
    found = connection.execute(
        f"SELECT count(*) FILTER (cell IS NULL), min(place) FILTER (cell IS NULL) FROM {values}"
    ).fetchone()
    assert found is not None  # an aggregate has one row
    facts["nulls"] = {"count": found[0], "row": found[1], "line": None}
    if column.type == "image":
        return facts
    found = connection.execute(
        f"SELECT min(place) FILTER (strlen(cell) > {MAX_CELL_BYTES}), min(place) FILTER (contains(cell, chr(0))), "
        f"max(length(cell)), approx_count_distinct(cell), sum(strlen(cell)), count(cell), "
        f"bool_and(starts_with(cell, '[')), bool_and(regexp_full_match(cell, ?)) FROM {values}",
        [NUMBER],
    ).fetchone()
    assert found is not None
    too_long, null_character, longest, roughly, size, present, listed, numeric = found
    for code, row in (("cell_too_long", too_long), ("null_character", null_character)):
        if row is not None:
            raise _at(code, table, row, position)
    if (size or 0) > most:
        raise ReadError("unpacks_too_large")
    if roughly <= 2 * MAX_CLASSES:  # the estimate is some percent off; the exact count needs memory
        cells = [
            cell
            for (cell,) in connection.execute(f"SELECT DISTINCT cell FROM {values} WHERE cell IS NOT NULL").fetchall()
        ]
        facts["distinct"] = len(cells) if len(cells) <= MAX_CLASSES else None
        if facts["distinct"] is not None and (longest or 0) <= MAX_CLASS_LENGTH:
            facts["classes"] = sorted(cells)
        if table.has_header and column.name in cells:
            raise ReadError("no_header", line=1, column=position)
    if present and column.type in ("string", "json", "mixed"):
        facts["chat"] = _chat(connection, values)
    if present and listed and column.type in ("string", "json", "mixed"):
        of_lists = _lists(_cells(connection, values))
        if of_lists is not None:
            facts |= {"type": "json", **of_lists}
    if present and numeric:
        facts["range"] = _range(connection, values)
    return facts


def _at(code: str, table: Table, row: int, position: int) -> ReadError:
    line = table.lines({row}).get(row)
    return ReadError(code, line=line, row=None if line else row, column=position)


def _cells(connection: duckdb.DuckDBPyConnection, values: str) -> Iterator[str]:
    found = connection.execute(f"SELECT cell FROM {values} WHERE cell IS NOT NULL")
    while batch := found.fetchmany(_CELLS_AT_ONCE):
        for (cell,) in batch:
            yield cell


def _chat(connection: duckdb.DuckDBPyConnection, values: str) -> dict[str, Any] | None:
    """What the cells hold by the first of them, and the first that is not so."""
    found = connection.execute(f"SELECT cell, place FROM {values} WHERE cell IS NOT NULL")
    holds = None
    while batch := found.fetchmany(_CELLS_AT_ONCE):
        holds = holds or looks_like(batch[0][0])
        if holds is None:
            return None
        for cell, row in batch:
            try:
                READERS[holds](cell)
            except InvalidChat as error:
                return {"holds": holds, "invalid": {"code": error.code, "row": row, "line": None}}
    return {"holds": holds, "invalid": None}


def _lists(cells: Iterator[str]) -> dict[str, Any] | None:
    """{lists, list_items, elements} where each cell is a JSON list of strings, or each one of integers."""
    found: set[str] | None = set()
    lengths = hashlib.sha256()
    kinds: set[type] = set()
    for cell in cells:
        try:
            value = json.loads(cell)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, list):
            return None
        kinds.update(map(type, value))
        if not (kinds <= {str} or kinds <= {int}):
            return None
        lengths.update(len(value).to_bytes(4))
        if found is not None:
            elements = [*map(str, value)]
            found.update(elements)
            if len(found) > MAX_CLASSES or not all(map(_is_class, elements)):
                found = None
    return {
        "lists": lengths.hexdigest(),
        "list_items": "integers" if int in kinds else "strings",
        "elements": None if found is None else sorted(found),
    }


def _compare(
    connection: duckdb.DuckDBPyConnection, rows: Path, columns: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Adds `unequal` to columns of lists; the places in it, whose lines are still to be found."""
    places = []
    lists = [column for column in columns if column["lists"] is not None][:_COMPARED]
    for one, other in combinations(lists, 2):
        if one["lists"] != other["lists"] and (row := _first_unequal(connection, rows, one["name"], other["name"])):
            place = {"row": row, "line": None}
            for column, name in ((one, other["name"]), (other, one["name"])):
                column["unequal"] = {**(column["unequal"] or {}), name: place}
            places.append(place)
    return places


def _first_unequal(connection: duckdb.DuckDBPyConnection, rows: Path, one: str, other: str) -> int | None:
    found = connection.execute(
        f"SELECT {identifier(one)}, {identifier(other)}, row_number() OVER () FROM read_parquet({literal(rows)})"
    )
    while batch := found.fetchmany(_CELLS_AT_ONCE):
        for *cells, place in batch:
            if None not in cells and len({len(json.loads(cell)) for cell in cells}) > 1:
                return int(place)
    return None


def _is_class(element: str) -> bool:
    # Half a surrogate pair and U+0000, which an escape may write, are in no database.
    return (
        len(element) <= MAX_CLASS_LENGTH and "\0" not in element and not any("\ud800" <= c <= "\udfff" for c in element)
    )


def _range(connection: duckdb.DuckDBPyConnection, values: str) -> list[float] | None:
    found = connection.execute(
        f"SELECT min(number), max(number) FROM (SELECT CAST(cell AS DOUBLE) AS number FROM {values})"
    ).fetchone()
    assert found is not None
    return [*found] if all(map(math.isfinite, found)) else None
