"""Reads one uploaded dataset: `python -m app.files.reader JOB`, in a process that a hostile file may ruin alone.

JOB is JSON: {"source", "filename", "unit_column", "rows", "profile", "limits"}. To the path `rows` it writes the
canonical rows as Parquet (every cell text or null, in the file's order; equal input gives equal bytes), to `profile` as
JSON {"format", "num_rows", "num_units", "records_per_unit", "columns": [{"name", "type", "distinct", "classes",
"nulls"}]} or {"problem": {…}}. The process sets its own limits before it opens the file. It has no need of a socket or
of another program, but nothing here forbids them.

Privacy units are the values of `unit_column` as text, compared character by character; without one (null) each row is
its own. records_per_unit: [[records, units, rows]], ascending: so many units have that many records, and have so many
rows together; the last entry stands for all units of MAX_RECORDS_PER_UNIT records and more.
"""

# ruff: noqa: S608 - names are quoted, and the database is this process's own memory

from __future__ import annotations

import ctypes
import json
import resource
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb

from app import tether
from app.files.formats import choose
from app.files.formats.interface import Column, Table, identifier, literal
from app.files.limits import (
    MAX_CELL_BYTES,
    MAX_CLASS_LENGTH,
    MAX_CLASSES,
    MAX_RECORDS_PER_UNIT,
    MAX_ROWS,
    ReaderLimits,
    max_column_bytes,
)
from app.files.problems import ReadError

_PR_SET_PDEATHSIG = 1


def main(job: Mapping[str, Any]) -> None:
    """One file, from limits to profile."""
    tether.become_unreadable()
    _confine(ReaderLimits(**job["limits"]))
    try:
        profile = read(Path(job["source"]), job["filename"], Path(job["rows"]), job["unit_column"])
    except ReadError as error:
        profile = {"problem": asdict(error.problem)}
    except (MemoryError, duckdb.OutOfMemoryException):
        profile = {"problem": {"code": "limits_exceeded"}}
    except Exception:  # a parser's own words may quote the file
        profile = {"problem": {"code": "processing_failed"}}
    Path(job["profile"]).write_text(json.dumps(profile), encoding="utf-8")


def read(source: Path, filename: str, rows: Path, unit_column: str | None = None) -> dict[str, Any]:
    """Writes the canonical rows and gives the profile. ReadError for what is wrong with the file."""
    format_ = choose(filename, source)
    with _connect(source, rows.parent) as connection:
        table = format_.open(connection, source)
        if unit_column is not None and unit_column not in [column.name for column in table.columns]:
            raise ReadError("unit_column_not_found")
        _write(connection, table, rows, format_.name)
        profile = _profile(connection, table, rows, max_column_bytes(source.stat().st_size))
        return {"format": format_.name, **profile, **_units(connection, table, rows, unit_column, profile["num_rows"])}


def _confine(limits: ReaderLimits) -> None:
    for kind, most in (
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_CPU, limits.cpu_seconds),
        (resource.RLIMIT_FSIZE, limits.written_bytes),
        (resource.RLIMIT_CORE, 0),  # a core dump would hold private rows
    ):
        resource.setrlimit(kind, (most, most))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _connect(source: Path, folder: Path) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(":memory:")
    for setting in (
        "threads=1",
        "enable_progress_bar=false",
        "memory_limit='1GiB'",
        "preserve_insertion_order=true",
        "autoload_known_extensions=false",
        "autoinstall_known_extensions=false",
        f"temp_directory={literal(folder / 'spill')}",
        f"allowed_paths=[{literal(source)}]",
        f"allowed_directories=[{literal(folder)}]",
        "enable_external_access=false",
        "lock_configuration=true",
    ):
        connection.execute(f"SET {setting}")
    return connection


def _write(connection: duckdb.DuckDBPyConnection, table: Table, rows: Path, format_name: str) -> None:
    problems: list[ReadError] = []
    for reading in table.readings:
        try:
            connection.execute(
                f"COPY ({reading.query}) TO {literal(rows)} (FORMAT parquet, COMPRESSION zstd, USE_TMP_FILE false)"
            )
        except (duckdb.OutOfMemoryException, MemoryError):
            raise
        except duckdb.Error:
            # What can be wrong with text, the formats find themselves.
            raise ReadError("invalid_parquet" if format_name == "parquet" else "processing_failed") from None
        problem = reading.problem()
        if problem is None:
            return
        problems.append(problem)
    raise problems[0]


def _profile(connection: duckdb.DuckDBPyConnection, table: Table, rows: Path, most: int) -> dict[str, Any]:
    counted = connection.execute(f"SELECT count(*) FROM read_parquet({literal(rows)})").fetchone()
    num_rows = counted[0] if counted else 0
    if num_rows == 0:
        raise ReadError("no_rows")
    if num_rows > MAX_ROWS:
        raise ReadError("too_many_rows")
    columns = [_column(connection, column, n, table, rows, most) for n, column in enumerate(table.columns, start=1)]
    missing = {column["nulls"]["row"] for column in columns if column["nulls"]["row"] is not None}
    lines = table.lines(missing) if missing else {}
    for column in columns:
        column["nulls"]["line"] = lines.get(column["nulls"]["row"])
    return {"num_rows": num_rows, "columns": columns}


def _units(
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
    for code, row in zip(("unit_missing", "unit_padded"), found, strict=True):
        if row is not None:
            line = table.lines({row}).get(row)
            position = [column.name for column in table.columns].index(unit_column) + 1
            raise ReadError(code, line=line, row=None if line else row, column=position)
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
    found = connection.execute(
        f"SELECT count(*) FILTER (cell IS NULL), min(place) FILTER (cell IS NULL), "
        f"min(place) FILTER (strlen(cell) > {MAX_CELL_BYTES}), min(place) FILTER (contains(cell, chr(0))), "
        f"max(length(cell)), approx_count_distinct(cell), sum(strlen(cell)) FROM {values}"
    ).fetchone()
    assert found is not None  # an aggregate has one row
    nulls, first_null, too_long, null_character, longest, roughly, size = found
    for code, row in (("cell_too_long", too_long), ("null_character", null_character)):
        if row is not None:
            line = table.lines({row}).get(row)
            raise ReadError(code, line=line, row=None if line else row, column=position)
    if (size or 0) > most:
        raise ReadError("unpacks_too_large")
    distinct, classes = None, None
    if roughly <= 2 * MAX_CLASSES:  # the estimate is some percent off; the exact count needs memory
        cells = [
            cell
            for (cell,) in connection.execute(f"SELECT DISTINCT cell FROM {values} WHERE cell IS NOT NULL").fetchall()
        ]
        distinct = len(cells) if len(cells) <= MAX_CLASSES else None
        if distinct is not None and (longest or 0) <= MAX_CLASS_LENGTH:
            classes = sorted(cells)
        if table.has_header and column.name in cells:
            raise ReadError("no_header", line=1, column=position)
    return {
        "name": column.name,
        "type": column.type,
        "distinct": distinct,
        "classes": classes,
        "nulls": {"count": nulls, "row": first_null, "line": None},
    }


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
