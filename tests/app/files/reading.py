"""Bytes through the reader, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.files.problems import Problem, ReadError
from app.files.reader import read

SECRET = "Ludwig-was-here"


def rows_of(tmp_path: Path, data: bytes, filename: str) -> list[tuple[str | None, ...]]:
    read_profile(tmp_path, data, filename)
    table = pq.read_table(tmp_path / "rows.parquet")
    assert all(kind in (pa.string(), pa.binary()) for kind in table.schema.types)
    return [tuple(row.values()) for row in table.to_pylist()]


def read_profile(tmp_path: Path, data: bytes, filename: str, unit_column: str | None = None) -> dict[str, Any]:
    (tmp_path / "source").write_bytes(data)
    (tmp_path / "rows.parquet").unlink(missing_ok=True)
    return read(tmp_path / "source", filename, tmp_path / "rows.parquet", unit_column)


def problem_of(tmp_path: Path, data: bytes, filename: str, unit_column: str | None = None) -> Problem:
    with pytest.raises(ReadError) as caught:
        read_profile(tmp_path, data, filename, unit_column)
    assert SECRET not in str(caught.value) + caught.value.problem.message
    return caught.value.problem


def parquet(tmp_path: Path, **columns: pa.Array | list[Any]) -> bytes:
    pq.write_table(pa.table(columns), tmp_path / "made.parquet")
    return (tmp_path / "made.parquet").read_bytes()
