"""CSV (RFC 4180) and TSV: a header, then rows of as many cells.

Every cell is text; an empty one is missing; blank lines are no rows. A `.csv` whose header has no comma may use a
semicolon, a tab or a bar. A TSV is read with quotes first, and without any where that fails: both are common.

Read by Python's csv module, strictly: 80 MB a CPU-second, and exact lines. DuckDB 2.0's reader is seven times faster
and not to be trusted here: in parallel it took 3,000 rows of quoted CSV text for 12,998,501, and with `parallel=false`
a last row whose quotes never end vanishes without a reject.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path

import duckdb

from app.files.formats.interface import Column, Format, Table, check_names, lines_of, stream
from app.files.formats.text import lines_within_limits, open_text, undecodable
from app.files.limits import MAX_CELL_BYTES, MAX_ROW_BYTES
from app.files.problems import ReadError

_BOM = b"\xef\xbb\xbf"

Row = tuple[int, list[str]]


def _open(
    delimiters: str, quotings: tuple[bool, ...], connection: duckdb.DuckDBPyConnection, path: Path, scratch: Path
) -> Table:
    with open_text(path) as file:
        try:
            first = file.readline(MAX_ROW_BYTES)
        except UnicodeDecodeError:
            raise undecodable(path) from None
    delimiter = next((each for each in delimiters if each in first), delimiters[0])
    header = [name.strip() for name in _header(path, delimiter)]
    check_names(header, line=1, code="no_header")
    columns = tuple(Column(name, "string") for name in header)
    return Table(
        columns=columns,
        readings=tuple(
            stream(connection, columns, _cells(_rows(path, delimiter, len(header), quoted))) for quoted in quotings
        ),
        lines=partial(_lines, path, delimiter, len(header), quotings),
        has_header=True,
    )


def _header(path: Path, delimiter: str) -> list[str]:
    """The first line's cells; ReadError where it is blank, or its quotes do not end on it or a few lines on."""
    with open_text(path) as file:
        try:
            return next(csv.reader(file, delimiter=delimiter, strict=True)) or [""]
        except (csv.Error, StopIteration):
            raise ReadError("no_header", line=1) from None
        except UnicodeDecodeError:
            raise undecodable(path) from None


def _rows(path: Path, delimiter: str, width: int, quoted: bool) -> Iterator[Row]:
    """Every row with the line that it begins on. ReadError on the first one that is broken."""
    csv.field_size_limit(MAX_CELL_BYTES)
    with open_text(path) as file:
        lines = lines_within_limits(file)
        if quoted:
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
        else:
            reader = csv.reader(lines, delimiter=delimiter, strict=True, quoting=csv.QUOTE_NONE)
        line = 0
        try:
            for number, cells in enumerate(reader):
                begins, line = line + 1, reader.line_num
                if number == 0 or not cells:  # the header, and blank lines
                    continue
                if len(cells) < width:
                    raise ReadError("too_few_cells", line=begins, column=len(cells))
                if len(cells) > width:
                    raise ReadError("too_many_cells", line=begins, column=width + 1)
                yield begins, cells
        except csv.Error as error:
            code = "cell_too_long" if "field limit" in str(error) else "broken_quotes"
            raise ReadError(code, line=line + 1) from None
        except UnicodeDecodeError:
            raise undecodable(path) from None


def _cells(rows: Iterator[Row]) -> Iterator[list[str | None]]:
    for _, cells in rows:
        yield [cell or None for cell in cells]


def _lines(
    path: Path, delimiter: str, width: int, quotings: tuple[bool, ...], rows: Collection[int]
) -> Mapping[int, int]:
    for quoted in quotings:
        try:
            return lines_of(_rows(path, delimiter, width, quoted), rows)
        except ReadError:
            continue
    return {}


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
