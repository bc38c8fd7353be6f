"""The canonical rows on disk: Parquet whose bytes are a function of the rows, whatever file they came from.

Row groups end at fixed numbers of rows and bytes, so that those of long texts and of images fit the memory too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from app.files.formats.interface import Table
from app.files.problems import ReadError

_GROUP_ROWS, _GROUP_BYTES = 2**16, 2**26
#: Rows that the database hands over at once.
_AT_ONCE = 256


def write_rows(connection: duckdb.DuckDBPyConnection, table: Table, rows: Path) -> None:
    """The table's rows, by the first reading that reads them all. ReadError of the first where none does."""
    schema = pa.schema([(c.name, pa.binary() if c.type == "image" else pa.string()) for c in table.columns])
    problems: list[ReadError] = []
    for reading in table.readings:
        try:
            batches = connection.sql(reading.query).to_arrow_reader(_AT_ONCE)
            with pq.ParquetWriter(
                rows, schema, compression="zstd", write_statistics=False, store_schema=False
            ) as writer:
                for group in _groups(batches):
                    writer.write_table(group.cast(schema), row_group_size=_GROUP_ROWS)
        except (duckdb.OutOfMemoryException, MemoryError):
            raise
        except (duckdb.Error, pa.ArrowException, OSError):
            # What can be wrong with the file, the formats find themselves.
            if reading.problem() is None:
                raise ReadError("processing_failed") from None
        problem = reading.problem()
        if problem is None:
            return
        problems.append(problem)
    raise problems[0]


def _groups(batches: pa.RecordBatchReader) -> Iterator[pa.Table]:
    """The same rows, cut where a group has enough of them or of bytes; each group in one piece."""
    parts: list[pa.RecordBatch] = []
    rows, size = 0, 0
    for batch in batches:
        ends = np.cumsum(_bytes_of_rows(batch))
        start = 0
        while start < batch.num_rows:
            before = ends[start - 1] if start else 0
            full = int(np.searchsorted(ends, before + _GROUP_BYTES - size)) + 1
            stop = min(full, start + _GROUP_ROWS - rows, batch.num_rows)
            parts.append(batch.slice(start, stop - start))
            rows, size, start = rows + stop - start, size + int(ends[stop - 1] - before), stop
            if rows == _GROUP_ROWS or size >= _GROUP_BYTES:
                yield pa.Table.from_batches(parts).combine_chunks()
                parts, rows, size = [], 0, 0
    if parts:
        yield pa.Table.from_batches(parts).combine_chunks()


def _bytes_of_rows(batch: pa.RecordBatch) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    sizes = np.zeros(batch.num_rows, dtype=np.int64)
    for column in batch.columns:
        sizes += pc.fill_null(pc.binary_length(column), 0).to_numpy(zero_copy_only=False)
    return sizes
