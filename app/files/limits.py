"""How much of anything a dataset may have, and what reading it may take."""

from __future__ import annotations

from dataclasses import dataclass

MAX_COLUMNS = 512
MAX_COLUMN_NAME = 64
MAX_ROWS = 100_000_000
#: Bytes of a cell in UTF-8: several hundred pages of text.
MAX_CELL_BYTES = 2**20
#: Bytes of a row in the file.
MAX_ROW_BYTES = 2**23
#: One request has so long to bring a file, or a part of one: what is stored without a row is nobody's after twice that.
MAX_RECEIVING_SECONDS = 43_200.0
#: Entries of a zip archive.
MAX_ARCHIVE_ENTRIES = 200_000
#: Of an image as uploaded.
MAX_IMAGE_BYTES = 2**25
MAX_IMAGE_PIXELS = 40_000_000
#: Pixels of an image's longer side in the canonical rows: more than any base model here looks at.
MAX_IMAGE_SIDE = 512
#: Classes are taken from columns with at most so many distinct values, of at most so many characters.
MAX_CLASSES = 1000
MAX_CLASS_LENGTH = 64
#: Whether a list of classes holds all of a column's values is told by a refusal: keys without the scope admin may
#: declare so many different lists for one file, or they could find out the values one by one.
MAX_LABEL_LISTS = 20
#: Records of a privacy unit are counted one by one up to here; a job never takes more of a unit into a step.
MAX_RECORDS_PER_UNIT = 256
#: Of a unit's records, those that a step takes where the job names no other number: their mean is nearly as good as
#: that of many more, and a step's memory and time stay bounded.
DEFAULT_RECORDS_PER_UNIT = 8


@dataclass(frozen=True, slots=True)
class ReaderLimits:
    """What the reading process may take. cpu_seconds, wall_seconds, written_bytes grow with the file."""

    memory_bytes: int
    cpu_seconds: int
    wall_seconds: float
    written_bytes: int


def limits_for(size: int) -> ReaderLimits:
    """For a file of `size` bytes: about twenty times what a well-formed one takes (10 MB a CPU-second or more)."""
    seconds = 60 + size // 500_000
    return ReaderLimits(
        # Address space, not resident memory: DuckDB and Arrow reserve more than they touch.
        memory_bytes=4 * 2**30,
        cpu_seconds=seconds,
        wall_seconds=4.0 * seconds,
        written_bytes=2**28 + 20 * size,
    )


def max_unpacked_bytes(size: int) -> int:
    """What a compressed file of `size` bytes may unpack to, on the disk: what the reader may write."""
    return limits_for(size).written_bytes


def max_column_bytes(size: int) -> int:
    """Text that one column of a file of `size` bytes may unpack to: compression of honest text stays far below."""
    return 2**29 + 20 * size
