"""Reads one uploaded dataset: `python -m app.files.reader JOB`, in a process that a hostile file may ruin alone.

JOB is JSON: {"source", "filename", "unit_column", "rows", "profile", "report", "progress", "limits"}. To the path
`rows` it writes the canonical rows as Parquet, to `profile` as JSON {"format", "num_rows", "num_units",
"records_per_unit", "columns"} (see `app.files.profile`) or {"problem": {…}}, to `report` the owner's report
(`app.files.report`), and on the way to `progress` how far it is (`app.files.progress`). The process sets its own limits
before it opens the file. It has no need of a socket or of another program, but nothing here forbids them.

Canonical rows: in the file's order; equal input gives equal bytes. Every cell is text or null, but for columns of type
`image`: those are bytes, a PNG or JPEG of at most 512 pixels a side in RGB without metadata. A column's type says what
its text is:

  string           itself
  integer, number  decimal digits, as JSON or SQL writes them; finite
  boolean          `true` or `false`
  json             a list or an object as JSON (tokens, tags, labels, messages)
  mixed            values of several of these types
  image            bytes, see above

CSV and TSV know no types: their columns are `string`. A text column, of whatever format, whose every cell is a JSON
list of strings is `json`; one whose every cell is a number stays `string`, and has a `range`.

Privacy units are the values of `unit_column` as text, compared character by character; without one (null) each row is
its own. records_per_unit: [[records, units, rows]], ascending: so many units have that many records, and have so many
rows together; the last entry stands for all units of MAX_RECORDS_PER_UNIT records and more.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb

from app import tether
from app.files.formats import choose, unpacked
from app.files.formats.canonical import write_rows
from app.files.formats.interface import literal
from app.files.limits import ReaderLimits, max_column_bytes
from app.files.problems import ReadError
from app.files.profile import profile, units
from app.files.progress import progress
from app.files.report import owner_report

_PR_SET_PDEATHSIG = 1


def main(job: Mapping[str, Any]) -> None:
    """One file, from limits to profile."""
    tether.become_unreadable()
    _confine(ReaderLimits(**job["limits"]))
    if os.getppid() != job["parent"]:
        raise SystemExit(1)  # the worker died before the kernel was asked to say so
    progress.start(Path(job["progress"]), Path(job["source"]).stat().st_size)
    try:
        found = read(Path(job["source"]), job["filename"], Path(job["rows"]), job["unit_column"], Path(job["report"]))
    except ReadError as error:
        found = {"problem": asdict(error.problem)}
    except (MemoryError, duckdb.OutOfMemoryException):
        found = {"problem": {"code": "limits_exceeded"}}
    except Exception:  # a parser's own words may quote the file
        found = {"problem": {"code": "processing_failed"}}
    Path(job["profile"]).write_text(json.dumps(found), encoding="utf-8")


def read(
    source: Path, filename: str, rows: Path, unit_column: str | None = None, report: Path | None = None
) -> dict[str, Any]:
    """Writes the canonical rows, and the owner's report where it is asked for, and gives the profile.

    ReadError for what is wrong with the file.
    """
    source, filename = unpacked(source, filename, rows.parent)
    format_ = choose(filename, source)
    with _connect(source, rows.parent) as connection:
        table = format_.open(connection, source, rows.parent)
        if unit_column is not None and unit_column not in [column.name for column in table.columns]:
            raise ReadError("unit_column_not_found")
        if unit_column in [column.name for column in table.columns if column.type == "image"]:
            raise ReadError("unit_is_image")
        write_rows(connection, table, rows)
        found = profile(connection, table, rows, max_column_bytes(source.stat().st_size))
        found |= units(connection, table, rows, unit_column, found["num_rows"])
        if report is not None:
            report.write_text(json.dumps(owner_report(connection, found, rows)), encoding="utf-8")
        return {"format": format_.name, **found}


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
    # Said at once: until then it has a thread for every core, and on a large machine the address space is used up.
    connection = duckdb.connect(":memory:", config={"threads": 1})
    for setting in (
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


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
