"""Zip archives of images: a folder a class (columns image, label), or a table `metadata.csv` (.tsv, .jsonl, .json,
.parquet) whose column `file_name` names each image beside it (columns image, and the table's others).

Rows of folders stand in the order of the images' names, so that one folder packed twice is one dataset. Only the table
is ever written to the disk, and not under its name; names are compared with each other and with `file_name`, no more.
Of what operating systems add (`__MACOSX`, hidden files, Thumbs.db) nothing is read.
"""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow.parquet as pq

from app.files.formats import images
from app.files.formats.canonical import write_rows
from app.files.formats.delimited import CSV, TSV
from app.files.formats.interface import Column, Format, Table, check_names, stream
from app.files.formats.json_array import JSON
from app.files.formats.jsonl import JSONL
from app.files.formats.packed import is_packed
from app.files.formats.parquet import PARQUET
from app.files.limits import MAX_ARCHIVE_ENTRIES, MAX_IMAGE_BYTES, max_unpacked_bytes
from app.files.problems import ReadError
from app.files.progress import progress

_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
_METADATA = {f"metadata{suffix}": each for each in (CSV, TSV, JSONL, JSON, PARQUET) for suffix in each.suffixes}
_FILE_NAME = "file_name"
_IMAGE = Column("image", "image")
_LOCAL_HEADER = 30
_ENCRYPTED = 0x1
_PIECE = 2**20
_BATCH_ROWS = 1024


def _open(connection: duckdb.DuckDBPyConnection, path: Path, scratch: Path) -> Table:
    archive = _Archive(path)
    tables = [name for name in archive.entries if name.rpartition("/")[2] in _METADATA]
    if len(tables) > 1:
        raise ReadError("metadata_unclear")
    if tables:
        return _listed(connection, archive, tables[0], scratch)
    return _by_folder(connection, archive)


class _Archive:
    """A zip file whose directory was checked. entries: what may be read, by name, in the order of names."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            begins_as_one = file.read(4) in _MAGIC
        if not begins_as_one:  # a zip may stand behind another file, which would be all that someone else sees
            raise ReadError("invalid_archive")
        try:
            self._path, self._file = path, zipfile.ZipFile(path)
        except MemoryError:
            raise
        except (zipfile.BadZipFile, OSError, ValueError, struct.error, NotImplementedError, OverflowError):
            raise ReadError("invalid_archive") from None
        infos = self._file.infolist()
        _check_directory(infos, self._file.start_dir, max_unpacked_bytes(path.stat().st_size))
        kept = (info for info in infos if not info.is_dir() and not _is_litter(info.filename))
        self.entries = {info.filename: info for info in sorted(kept, key=lambda info: info.filename)}

    def read(self, name: str, most: int) -> Iterator[bytes]:
        """The entry's bytes in pieces. ReadError for what is damaged; image_too_large for more than `most`."""
        if self.entries[name].file_size > most:
            raise ReadError("image_too_large")
        try:
            with self._file.open(self.entries[name]) as entry:
                while data := entry.read(_PIECE):
                    yield data
        except MemoryError:
            raise
        except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, zlib.error, struct.error):
            raise ReadError("invalid_archive") from None

    def image(self, name: str, row: int) -> bytes:
        """The canonical image of that name, which is the row's."""
        try:
            data = b"".join(self.read(name, MAX_IMAGE_BYTES))
        except ReadError as error:
            raise ReadError(error.problem.code, row=row, column=1) from None
        if data.startswith(_MAGIC) or is_packed(data):
            raise ReadError("nested_archive", row=row, column=1)
        progress.at(self._path, row / len(self.entries))
        return images.canonical(data, row=row, column=1)


def _check_directory(infos: list[zipfile.ZipInfo], directory: int, most_bytes: int) -> None:
    if len(infos) > MAX_ARCHIVE_ENTRIES:
        raise ReadError("too_many_entries")
    if len({info.filename for info in infos}) != len(infos):
        raise ReadError("duplicate_entry")
    for info in infos:
        if info.flag_bits & _ENCRYPTED:
            raise ReadError("encrypted_archive")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ReadError("unsupported_compression")
        if not _is_safe(info.orig_filename):
            raise ReadError("unsafe_name")
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ReadError("link_in_archive")
    if sum(info.file_size for info in infos) > most_bytes:
        raise ReadError("unpacks_too_large")
    # Entries that share bytes with others unpack to many times what they should: a bomb without a high ratio.
    ends = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < ends:
            raise ReadError("invalid_archive")
        ends = info.header_offset + _LOCAL_HEADER + info.compress_size
    if ends > directory:
        raise ReadError("invalid_archive")


def _is_safe(name: str) -> bool:
    parts = name.removesuffix("/").split("/")
    return name.isprintable() and not set("\\:") & set(name) and not {"", ".", ".."} & set(parts)


def _is_litter(name: str) -> bool:
    parts = name.split("/")
    return parts[0] == "__MACOSX" or parts[-1].startswith(".") or parts[-1] in ("Thumbs.db", "desktop.ini")


def _by_folder(connection: duckdb.DuckDBPyConnection, archive: _Archive) -> Table:
    folders = {name: name.split("/")[:-1] for name in archive.entries}
    above = {tuple(folder[:-1]) for folder in folders.values()}
    if not all(folders.values()) or len(above) > 1:
        raise ReadError("folders_unclear")
    if not folders:
        raise ReadError("no_rows")
    columns = (_IMAGE, Column("label", "string"))
    rows = ((archive.image(name, row), folder[-1]) for row, (name, folder) in enumerate(folders.items(), start=1))
    return Table(columns, (stream(connection, columns, rows),), _no_lines)


def _no_lines(rows: Collection[int]) -> Mapping[int, int]:
    return {}


def _listed(connection: duckdb.DuckDBPyConnection, archive: _Archive, name: str, scratch: Path) -> Table:
    """The table's rows are made canonical first, in a file: one reading cannot run within another."""
    folder, _, basename = name.rpartition("/")
    given, canonical = scratch / "metadata", scratch / "metadata.parquet"
    with given.open("wb") as out:
        for data in archive.read(name, archive.entries[name].file_size):
            out.write(data)
    table = _METADATA[basename].open(connection, given, scratch)
    if _FILE_NAME not in [column.name for column in table.columns] or any(c.type == "image" for c in table.columns):
        raise ReadError("metadata_unclear")
    columns = (_IMAGE, *(column for column in table.columns if column.name != _FILE_NAME))
    check_names([column.name for column in columns])
    write_rows(connection, table, canonical)
    rows = _Listed(archive, f"{folder}/" if folder else "", name, canonical, table)
    return Table(columns, (stream(connection, columns, rows.read()),), table.lines, table.has_header)


@dataclass(frozen=True, slots=True)
class _Listed:
    """prefix: what the table's names lack; canonical: its rows."""

    archive: _Archive
    prefix: str
    name: str
    canonical: Path
    table: Table

    def read(self) -> Iterator[list[str | bytes | None]]:
        """Every row with its image. ReadError where table and archive do not list the same images once each."""
        left = {name for name in self.archive.entries if name != self.name}
        position = [column.name for column in self.table.columns].index(_FILE_NAME)
        row = 0
        with pq.ParquetFile(self.canonical) as file:
            for batch in file.iter_batches(_BATCH_ROWS, use_threads=False):
                for cells in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    row += 1
                    name = f"{self.prefix}{cells[position] or ''}"
                    if name not in left:
                        code = "image_listed_twice" if name in self.archive.entries else "image_not_found"
                        raise self._wrong(code, row, position)
                    left.remove(name)
                    yield [self.archive.image(name, row), *cells[:position], *cells[position + 1 :]]
        if left:
            raise ReadError("image_not_listed")

    def _wrong(self, code: str, row: int, position: int) -> ReadError:
        line = self.table.lines({row}).get(row)
        return ReadError(code, line=line, row=None if line else row, column=position + 1)


IMAGE_ZIP = Format(
    name="image_zip",
    suffixes=(".zip",),
    content_type="application/zip",
    sniff_order=1,
    sniff=lambda beginning: beginning.startswith(_MAGIC),
    open=_open,
)
