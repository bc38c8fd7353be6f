"""Arrow files and streams give the rows that Parquet gives, and damage is refused before anything trusts it."""

from __future__ import annotations

import datetime
import io
import struct
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from app.files.problems import Problem
from tests.app.files.reading import SECRET, parquet, problem_of, read_profile, rows_of

WHO = uuid.UUID(int=7)


def ipc(table: pa.Table, *, stream: bool = False, **options: Any) -> bytes:
    out = io.BytesIO()
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(out, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return out.getvalue()


TABLE = pa.table(
    {
        "text": pa.array(["good", None, "Größe"]),
        "label": pa.array(["a", "b", "a"]).dictionary_encode(),
        "tags": pa.array([["O", "B-PER"], [], None]),
        "n": pa.array([1, 2, 3], pa.uint8()),
        "x": pa.array([0.5, float("nan"), 2.0], pa.float32()),
        "half": pa.array([0.5, 1.5, 2.0], pa.float16()),
        "yes": pa.array([True, False, None]),
        "day": pa.array([datetime.date(2026, 1, 2)] * 3),
        "price": pa.array([Decimal("1.50")] * 3, pa.decimal128(5, 2)),
        "who": pa.array([WHO.bytes] * 3, pa.uuid()),
        "where": pa.array([{"city": "Ulm", "geo": [1.0, 2.0]}] * 3),
        "none": pa.nulls(3),
    }
)
ROWS = [
    ("good", "a", '["O","B-PER"]', "1", "0.5", "0.5", "true"),
    (None, "b", "[]", "2", None, "1.5", "false"),
    ("Größe", "a", None, "3", "2.0", "2.0", None),
]
REST = ("2026-01-02", "1.50", str(WHO), '{"city":"Ulm","geo":[1.0,2.0]}', None)
TYPES = ["string", "string", "json", "integer", "number", "number", "boolean", "string", "number", "string", "json"]


@pytest.mark.parametrize("name", ["a.arrow", "a.feather", "unnamed"])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
def test_arrow_files_and_streams(tmp_path: Path, name: str, stream: bool, compression: str | None) -> None:
    data = ipc(TABLE, stream=stream, compression=compression)
    assert rows_of(tmp_path, data, name) == [row + REST for row in ROWS]
    profile = read_profile(tmp_path, data, name)
    assert profile["format"] == "arrow"
    assert [column["type"] for column in profile["columns"]] == [*TYPES, "string"]


def test_parquet_gives_the_same_bytes(tmp_path: Path) -> None:
    rows_of(tmp_path, ipc(TABLE), "a.arrow")
    written = (tmp_path / "rows.parquet").read_bytes()
    made = parquet(tmp_path, **{name: TABLE.column(name) for name in TABLE.column_names})
    assert rows_of(tmp_path, made, "a.parquet") == [row + REST for row in ROWS]
    assert (tmp_path / "rows.parquet").read_bytes() == written


def test_large_and_many_batches(tmp_path: Path) -> None:
    text = [f"text {n}" for n in range(5000)]
    data = ipc(pa.table({"text": pa.chunked_array([text[:10], text[10:4000], text[4000:]])}), stream=True)
    assert rows_of(tmp_path, data, "a.arrow") == [(cell,) for cell in text]


@pytest.mark.parametrize("cut", [0, 9, 40, 300, 700])
@pytest.mark.parametrize("stream", [True, False])
def test_a_file_cut_off_is_refused(tmp_path: Path, cut: int, stream: bool) -> None:
    data = ipc(pa.table({"text": [SECRET] * 100}), stream=stream)[:cut]
    code = "invalid_arrow" if cut else "empty_file"
    assert problem_of(tmp_path, data, "a.arrow") == Problem(code)


def test_offsets_that_lead_astray_are_refused(tmp_path: Path) -> None:
    data = ipc(pa.table({"text": ["aa", "bb", "cc"]}))
    offsets = struct.pack("<4i", 0, 2, 4, 6)
    assert data.count(offsets) == 1
    for wrong in ((0, 2, 1_000_000, 6), (0, -5, 4, 6), (0, 2, 4, 2**31 - 1), (0, 6, 2, 4)):
        astray = data.replace(offsets, struct.pack("<4i", *wrong))
        assert problem_of(tmp_path, astray, "a.arrow") == Problem("invalid_arrow")


def test_indices_beyond_their_dictionary_are_refused(tmp_path: Path) -> None:
    indices = struct.pack("<3i", 0, 1, 0)
    data = ipc(pa.table({"text": pa.array(["aa", "bb", "aa"]).dictionary_encode()}))
    for wrong in ((0, 7, 0), (0, -1, 0)):
        assert problem_of(tmp_path, data.replace(indices, struct.pack("<3i", *wrong)), "a.arrow") == Problem(
            "invalid_arrow"
        )


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    data = ipc(pa.table({"text": [SECRET]})).replace(b"Ludwig", b"\xffudwig")
    assert problem_of(tmp_path, data, "a.arrow") == Problem("invalid_arrow")


@pytest.mark.parametrize(
    "values",
    [
        pa.RunEndEncodedArray.from_arrays(pa.array([10**9], pa.int32()), pa.array(["bomb"])),
        pa.array([[1.0]], pa.list_view(pa.float64())),
        pa.array([[b"x"]]),
        pa.array([(1, 2, 3)], pa.month_day_nano_interval()),
        pa.array([b"xx"], pa.binary(2)),
        pa.array([1], pa.decimal256(50, 2)),
        pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1])]),
        pa.ExtensionArray.from_storage(
            pa.fixed_shape_tensor(pa.int8(), [2]), pa.array([[1, 2]], pa.list_(pa.int8(), 2))
        ),
    ],
    ids=lambda values: str(values.type)[:24],
)
def test_types_without_a_cell_are_refused(tmp_path: Path, values: pa.Array) -> None:
    data = ipc(pa.table({"text": pa.array(["x"] * len(values[:1])), "y": values[:1]}))
    assert problem_of(tmp_path, data, "a.arrow") == Problem("unsupported_column", column=2)


@pytest.mark.parametrize(
    "values",
    [
        pa.array([1.0, float("inf")]),
        pa.array([1.0, float("-inf")], pa.float16()),
        pa.array([[1.0], [2.0, float("nan")]]),
        pa.array([None, {"a": [{"b": float("inf")}]}]),
        pa.array([None, [("k", float("nan"))]], pa.map_(pa.string(), pa.float64())),
        pa.array([[1.0, 2.0], [2.0, float("nan")]], pa.list_(pa.float64(), 2)),
    ],
    ids=lambda values: str(values.type),
)
def test_numbers_that_are_none_are_refused(tmp_path: Path, values: pa.Array) -> None:
    data = ipc(pa.table({"text": ["x", "y"], "y": values}))
    assert problem_of(tmp_path, data, "a.arrow") == Problem("number_not_finite", row=2, column=2)


def test_rows_without_bytes_are_counted(tmp_path: Path) -> None:
    """A column of nulls takes no space: a few hundred bytes may claim any number of rows."""
    batch = pa.record_batch({"x": pa.nulls(10**8 + 1)})
    assert problem_of(tmp_path, ipc(pa.Table.from_batches([batch])), "a.arrow") == Problem("too_many_rows")
    assert problem_of(tmp_path, ipc(pa.table({})), "a.arrow") == Problem("no_rows")
    assert problem_of(tmp_path, ipc(pa.table({"x": pa.array([], pa.string())})), "a.arrow") == Problem("no_rows")
