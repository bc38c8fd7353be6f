"""CSV (RFC 4180) and TSV: a header, then rows of as many cells.

Every cell is text; an empty one is missing. A `.csv` whose header has no comma may use a semicolon, a tab or a bar.
A TSV is read with quotes first, and without any where that fails: both are common, and a file that is right under both
rules but means another thing under each is not.
"""

# ruff: noqa: S608 - names are quoted, and the database is this process's own memory

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

import duckdb

from app.files.formats.interface import Column, Format, Table, check_names, identifier, literal
from app.files.limits import MAX_ROW_BYTES
from app.files.problems import ReadError

_BOM = b"\xef\xbb\xbf"
_BLOCK = 2**20

#: DuckDB's reasons for a rejected row, and ours.
_REASONS = {
    "TOO MANY COLUMNS": "too_many_cells",
    "MISSING COLUMNS": "too_few_cells",
    "UNQUOTED VALUE": "broken_quotes",
    "LINE SIZE OVER MAXIMUM": "row_too_long",
    "INVALID ENCODING": "undecodable_bytes",
}


def _open(delimiters: str, quotings: tuple[bool, ...], connection: duckdb.DuckDBPyConnection, path: Path) -> Table:
    header, delimiter = _header(path, delimiters)
    numbers = range(len(header))
    types = ", ".join(f"'c{number}': 'VARCHAR'" for number in numbers)
    names = ", ".join(f"c{number} AS {identifier(header[number])}" for number in numbers)

    def query(quoted: bool) -> str:
        quote = "quote='\"', escape='\"'" if quoted else "quote='', escape=''"
        return (
            f"SELECT {names} FROM read_csv({literal(path)}, auto_detect=false, header=true, columns={{{types}}}, "
            f"delim={literal(delimiter)}, {quote}, strict_mode=true, store_rejects=true, rejects_limit=100, "
            # One thread: where a block of the file begins inside a quoted cell cannot be told from the block alone.
            f"parallel=false, max_line_size={MAX_ROW_BYTES})"
        )

    return Table(
        columns=tuple(Column(name, "string") for name in header),
        queries=tuple(query(quoted) for quoted in quotings),
        problem=partial(_problem, connection, path),
        lines=partial(_lines, path, delimiter, len(header)),
        has_header=True,
    )


def _header(path: Path, delimiters: str) -> tuple[list[str], str]:
    """The names of the columns, and the delimiter."""
    with path.open("rb") as file:
        beginning = file.read(_BLOCK).removeprefix(_BOM)
    try:
        text = beginning.decode("utf-8")
    except UnicodeDecodeError as error:
        # Beyond the first line it may be a character that the block's end cuts; a bad byte there is found later.
        text = beginning[: error.start].decode("utf-8")
        if "\n" not in text and "\r" not in text:
            raise ReadError("undecodable_bytes", line=1) from None
    lines = list(io.StringIO(text, newline=""))
    if not lines or not lines[0].strip():
        raise ReadError("no_header", line=1)
    delimiter = next((each for each in delimiters if each in lines[0]), delimiters[0])
    try:
        names = [name.strip() for name in next(csv.reader(lines, delimiter=delimiter, strict=True))]
    except csv.Error:
        raise ReadError("no_header", line=1) from None
    check_names(names, line=1, code="no_header")
    return names, delimiter


def _problem(connection: duckdb.DuckDBPyConnection, path: Path) -> ReadError | None:
    first = connection.execute(
        "SELECT byte_position, column_idx, error_type::VARCHAR FROM reject_errors ORDER BY line, column_idx LIMIT 1"
    ).fetchone()
    connection.execute("DROP TABLE reject_errors")
    connection.execute("DROP TABLE reject_scans")
    if first is None:
        return None
    position, column, reason = first
    code = _REASONS.get(reason, "broken_row")
    return ReadError(code, line=_line_at(path, position), column=None if code == "row_too_long" else column)


def _line_at(path: Path, position: int) -> int:
    """The line of a byte (both from 1). DuckDB counts rows, and a row with quoted newlines has several lines."""
    left, line, after_return = position - 1, 1, False
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(_BLOCK, left))):
            left -= len(block)
            newlines, returns, pairs = block.count(b"\n"), block.count(b"\r"), block.count(b"\r\n")
            line += newlines + returns - pairs - (after_return and block.startswith(b"\n"))
            after_return = block.endswith(b"\r")
    return line


def _lines(path: Path, delimiter: str, width: int, rows: Collection[int]) -> Mapping[int, int]:
    """Reads up to the last of the wanted rows: only asked for when something is wrong with them."""
    found: dict[int, int] = {}
    previous = csv.field_size_limit(MAX_ROW_BYTES)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter)
            next(reader)
            row, line = 0, reader.line_num + 1
            for cells in reader:
                if cells or width == 1:  # a blank line is no row
                    row += 1
                    if row in rows:
                        found[row] = line
                        if len(found) == len(rows):
                            break
                line = reader.line_num + 1
    finally:
        csv.field_size_limit(previous)
    return found


def _first_line(beginning: bytes) -> bytes:
    return (beginning.removeprefix(_BOM).splitlines() or [b""])[0]


CSV = Format(
    name="csv",
    suffixes=(".csv",),
    content_type="text/csv",
    sniff_order=4,
    sniff=lambda beginning: b"," in _first_line(beginning) or b";" in _first_line(beginning),
    open=partial(_open, ",;\t|", (True,)),
)

TSV = Format(
    name="tsv",
    suffixes=(".tsv", ".tab"),
    content_type="text/tab-separated-values",
    sniff_order=3,
    sniff=lambda beginning: b"\t" in _first_line(beginning),
    open=partial(_open, "\t", (True, False)),
)
