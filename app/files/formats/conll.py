"""CoNLL: a token a line, its tag last, sentences parted by blank lines. Each sentence is a row {tokens, tags}.

Cells of a line are parted by tabs where it has any, else by spaces; every line has as many as the first. Lines that
begin with -DOCSTART- part sentences and are no tokens; comments (`# key = value`, `#begin document`) before a sentence
are skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import duckdb

from app.files.formats.interface import Column, Format, Table, lines_of, stream
from app.files.formats.objects import to_json
from app.files.formats.text import lines_within_limits, open_text, undecodable
from app.files.limits import MAX_COLUMNS, MAX_ROW_BYTES
from app.files.problems import ReadError

_COLUMNS = (Column("tokens", "json"), Column("tags", "json"))
_DOCUMENT = "-DOCSTART-"
_COMMENT = re.compile(r"#\s*([\w.-]+\s*=|begin document|end document)")
#: Not Unicode's idea of white space: a token may be a space of its own kind.
_SPACES = re.compile(r"[ \t]+")
_BLANK = " \t\r\n"
_TAG = re.compile(rb"O|[BIESLUM]-\S+")


def _open(connection: duckdb.DuckDBPyConnection, path: Path, scratch: Path) -> Table:
    rows = ([to_json(tokens), to_json(tags)] for _, (tokens, tags) in _sentences(path))
    return Table(_COLUMNS, (stream(connection, _COLUMNS, rows),), lambda wanted: lines_of(_sentences(path), wanted))


def _sentences(path: Path) -> Iterator[tuple[int, tuple[list[str], list[str]]]]:
    """Every sentence with the line of its first token: its tokens and as many tags."""
    with open_text(path) as file:
        try:
            yield from _parsed(lines_within_limits(file))
        except UnicodeDecodeError:
            raise undecodable(path) from None


def _parsed(lines: Iterator[str]) -> Iterator[tuple[int, tuple[list[str], list[str]]]]:
    width: int | None = None
    begins, size = 0, 0
    tokens: list[str] = []
    tags: list[str] = []
    for number, line in enumerate(lines, start=1):
        text = line.strip(_BLANK) if "\t" not in line else line.rstrip("\r\n")
        parts = not text.strip(_BLANK) or text.startswith(_DOCUMENT)
        if parts or (not tokens and _COMMENT.match(text)):
            if parts and tokens:
                yield begins, (tokens, tags)
                tokens, tags, size = [], [], 0
            continue
        if "\0" in text:  # JSON would write it as an escape
            raise ReadError("null_character", line=number)
        cells = text.split("\t") if "\t" in text else _SPACES.split(text)
        if width is None:
            width = len(cells)
            if width > MAX_COLUMNS:
                raise ReadError("too_many_columns", line=number)
        if len(cells) < max(width, 2) or not cells[0] or not cells[-1]:
            raise ReadError("too_few_cells", line=number, column=len(cells))
        if len(cells) > width:
            raise ReadError("too_many_cells", line=number, column=width + 1)
        if not tokens:
            begins = number
        tokens.append(cells[0])
        tags.append(cells[-1])
        size += len(line)
        if size > MAX_ROW_BYTES:
            raise ReadError("row_too_long", line=begins)
    if tokens:
        yield begins, (tokens, tags)


def _sniff(beginning: bytes) -> bool:
    """Several lines, of which each ends in a tag of the usual schemes."""
    lines = [line for line in beginning.removeprefix(b"\xef\xbb\xbf").splitlines()[:-1] if line.strip()]
    tagged = [line for line in lines if not line.startswith(_DOCUMENT.encode())]
    return len(tagged) > 1 and all(
        len(cells := line.split()) > 1 and _TAG.fullmatch(cells[-1]) is not None for line in tagged
    )


CONLL = Format(
    name="conll",
    suffixes=(".conll", ".iob", ".iob2", ".bio"),
    content_type="text/plain",
    sniff_order=2,
    sniff=_sniff,
    open=_open,
)
