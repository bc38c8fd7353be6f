"""Parquet. What its columns become: `app.files.formats.arrow_columns`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from app.files.formats.arrow_columns import BATCH_ROWS, open_batches
from app.files.formats.interface import Format, Table
from app.files.limits import MAX_ROWS, max_column_bytes
from app.files.problems import ReadError
from app.files.progress import progress


def _open(connection: duckdb.DuckDBPyConnection, path: Path, scratch: Path) -> Table:
    try:
        file = pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True)
        schema, num_rows = file.schema_arrow, file.metadata.num_rows
    except MemoryError:
        raise
    except (pa.ArrowException, OSError, ValueError):
        raise ReadError("invalid_parquet") from None
    if num_rows > MAX_ROWS:
        raise ReadError("too_many_rows")
    return open_batches(
        connection, schema, _batches(path, file), "invalid_parquet", max_column_bytes(path.stat().st_size)
    )


def _batches(path: Path, file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    rows = 0
    for batch in file.iter_batches(batch_size=BATCH_ROWS, use_threads=False):
        yield batch
        rows += batch.num_rows
        progress.at(path, rows / max(file.metadata.num_rows, 1))


PARQUET = Format(
    name="parquet",
    suffixes=(".parquet", ".pq"),
    content_type="application/vnd.apache.parquet",
    sniff_order=1,
    sniff=lambda beginning: beginning.startswith(b"PAR1"),
    open=_open,
)
