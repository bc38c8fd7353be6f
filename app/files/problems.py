"""What can be wrong with an uploaded dataset: a fixed code, a place, and never anything that was read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PROBLEMS: dict[str, str] = {
    "empty_file": "The file is empty.",
    "format_unknown": "The file is none of those that this server reads.",
    "no_header": "The first line is not a header: it must name every column once, in at most 64 characters each, "
    "and a name may not occur as a value of its own column.",
    "duplicate_column": "Two columns have the same name.",
    "column_name_invalid": "A column's name is empty, longer than 64 characters or holds control characters.",
    "too_many_columns": "The file has more columns than this server takes.",
    "unsupported_column": "A column holds a type of values that this server does not read.",
    "no_rows": "The file has no rows.",
    "too_many_rows": "The file has more rows than this server takes.",
    "too_few_cells": "A row has fewer cells than the header.",
    "too_many_cells": "A row has more cells than the header.",
    "broken_quotes": "A quoted cell does not end where it should.",
    "broken_row": "A row cannot be read.",
    "row_too_long": "A row is longer than this server takes.",
    "cell_too_long": "A cell is longer than this server takes, or its quotes do not end.",
    "unpacks_too_large": "The file unpacks to more text than this server takes.",
    "undecodable_bytes": "The file is not UTF-8 text.",
    "null_character": "A cell holds the character U+0000.",
    "invalid_json": "This is not valid JSON.",
    "not_an_object": "A row is valid JSON, but not an object.",
    "number_not_finite": "A number is infinite or too large, or a list holds NaN.",
    "invalid_compression": "The compressed file is damaged, cut off, or followed by something else.",
    "nested_archive": "The archive holds another archive.",
    "invalid_archive": "The zip archive is damaged, or its entries overlap.",
    "too_many_entries": "The archive has more entries than this server takes.",
    "duplicate_entry": "The archive has two entries of the same name.",
    "encrypted_archive": "The archive is encrypted.",
    "unsupported_compression": "An entry of the archive is neither stored nor deflated.",
    "unsafe_name": "An entry of the archive has a name that is no path within it.",
    "link_in_archive": "An entry of the archive is a link or a device.",
    "folders_unclear": "An archive holds images in one folder a class, side by side, or a table metadata.csv, "
    "metadata.jsonl or metadata.parquet that lists them.",
    "metadata_unclear": "The archive has several tables of metadata, or its table has no column file_name, or images.",
    "image_not_found": "The archive has no image of the name that its table gives.",
    "image_listed_twice": "The archive's table lists an image twice.",
    "image_not_listed": "The archive has images that its table does not list.",
    "invalid_parquet": "The Parquet file is damaged.",
    "invalid_arrow": "The Arrow file is damaged.",
    "not_an_image": "An image is none of PNG, JPEG, WebP and BMP.",
    "invalid_image": "An image is damaged or cut off.",
    "image_too_large": "An image has more bytes or pixels than this server takes.",
    "image_animated": "An image has several frames.",
    "unit_column_not_found": "The file has no column of the name given as privacy_unit.",
    "unit_is_image": "The column given as privacy_unit holds images.",
    "unit_missing": "A row has no value in the column of its privacy unit.",
    "unit_padded": "A value in the privacy unit's column begins or ends with white space: one person could be two.",
    "privacy_unit_mismatch": "These rows belong to a file with another privacy unit, or with none.",
    "was_private": "These rows belong to a file that is protected: they cannot be declared public.",
    "limits_exceeded": "Reading the file took more memory, time or disk than this server allows.",
    "processing_failed": "The file could not be read.",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """line: in the file (unpacked), from 1, as an editor counts; column: the cell of the row, or the character of the
    line (JSON, JSONL), from 1; row: of the data, from 1, where lines say little (Parquet, Arrow, JSON)."""

    code: str
    line: int | None = None
    column: int | None = None
    row: int | None = None

    @property
    def message(self) -> str:
        """For a person: the place and the reason."""
        place = ", ".join(
            f"{name} {number}"
            for name, number in (("line", self.line), ("row", self.row), ("column", self.column))
            if number is not None
        )
        reason = PROBLEMS[self.code]
        return f"{place[0].upper()}{place[1:]}: {reason}" if place else reason

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, as the file's row and the wire have it."""
        return {"code": self.code, "message": self.message, "line": self.line, "column": self.column, "row": self.row}


class ReadError(Exception):
    """The dataset is wrong. It carries nothing but the problem."""

    def __init__(self, code: str, *, line: int | None = None, column: int | None = None, row: int | None = None):
        super().__init__(code)
        self.problem = Problem(code, line, column, row)
