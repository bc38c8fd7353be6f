"""Arrow IPC, the file format and the stream. What its columns become: `app.files.formats.arrow_columns`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa

from app.files.formats.arrow_columns import open_batches
from app.files.formats.interface import Format, Table
from app.files.limits import max_column_bytes
from app.files.problems import ReadError
from app.files.progress import progress

_FILE_MAGIC = b"ARROW1\0\0"
#: Where a stream's first message begins, since Arrow 0.15.
_CONTINUATION = b"\xff\xff\xff\xff"
_OPTIONS = pa.ipc.IpcReadOptions(use_threads=False)


def _open(connection: duckdb.DuckDBPyConnection, path: Path, scratch: Path) -> Table:
    source = pa.OSFile(str(path), "rb")
    try:
        if source.read(len(_FILE_MAGIC)) == _FILE_MAGIC:
            file = pa.ipc.open_file(source, options=_OPTIONS)
            schema, batches = file.schema, _batches_of_file(path, file)
        else:
            source.seek(0)
            reader = pa.ipc.open_stream(source, options=_OPTIONS)
            schema, batches = reader.schema, _batches_of_stream(path, source, reader)
    except MemoryError:
        raise
    except (pa.ArrowException, OSError, ValueError):
        raise ReadError("invalid_arrow") from None
    return open_batches(connection, schema, batches, "invalid_arrow", max_column_bytes(path.stat().st_size))


def _batches_of_file(path: Path, file: pa.ipc.RecordBatchFileReader) -> Iterator[pa.RecordBatch]:
    for n in range(file.num_record_batches):
        yield file.get_batch(n)
        progress.at(path, (n + 1) / file.num_record_batches)


def _batches_of_stream(
    path: Path, source: pa.NativeFile, reader: pa.ipc.RecordBatchStreamReader
) -> Iterator[pa.RecordBatch]:
    for batch in reader:
        yield batch
        progress.at(path, source.tell() / source.size())
    progress.at(path, 1.0)  # a marker of the end stands behind the last one


ARROW = Format(
    name="arrow",
    suffixes=(".arrow", ".arrows", ".feather", ".ipc"),
    content_type="application/vnd.apache.arrow.file",
    sniff_order=1,
    sniff=lambda beginning: beginning.startswith((_FILE_MAGIC, _CONTINUATION)),
    open=_open,
)
