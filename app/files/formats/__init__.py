"""The formats of datasets. A new one is a file here and a line in FORMATS."""

from __future__ import annotations

from pathlib import Path

from app.files.formats import arrow, conll, delimited, image_zip, json_array, jsonl, parquet
from app.files.formats.interface import Format
from app.files.formats.packed import unpacked
from app.files.problems import ReadError

__all__ = ["FORMATS", "choose", "unpacked"]

FORMATS: dict[str, Format] = {
    "csv": delimited.CSV,
    "tsv": delimited.TSV,
    "jsonl": jsonl.JSONL,
    "json": json_array.JSON,
    "conll": conll.CONLL,
    "parquet": parquet.PARQUET,
    "arrow": arrow.ARROW,
    "image_zip": image_zip.IMAGE_ZIP,
}

#: How much of a file is looked at to tell its format.
_LOOK = 2**16


def choose(filename: str, path: Path) -> Format:
    """By the name's ending; where that says nothing, by how the file begins. ReadError format_unknown, empty_file."""
    with path.open("rb") as file:
        beginning = file.read(_LOOK)
    if not beginning.strip(b"\xef\xbb\xbf \t\r\n"):
        raise ReadError("empty_file")
    suffix = Path(filename).suffix.lower()
    for format_ in FORMATS.values():
        if suffix in format_.suffixes:
            return format_
    for format_ in sorted(FORMATS.values(), key=lambda each: each.sniff_order):
        if format_.sniff(beginning):
            return format_
    raise ReadError("format_unknown")
