"""Parquet. Text stays text, numbers and booleans become it, lists and structs become JSON; NaN is a missing cell."""

# ruff: noqa: S608 - names are quoted, and the database is this process's own memory

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from app.files.formats.interface import Column, ColumnType, Format, Reading, Table, check_names, identifier, literal
from app.files.limits import MAX_ROWS
from app.files.problems import ReadError


def _open(connection: duckdb.DuckDBPyConnection, path: Path) -> Table:
    try:
        metadata = pq.read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
    except (pa.ArrowException, OSError, ValueError):
        raise ReadError("invalid_parquet") from None
    if metadata.num_rows > MAX_ROWS:
        raise ReadError("too_many_rows")
    check_names(schema.names)
    columns = tuple(Column(field.name, _type(field.type, n)) for n, field in enumerate(schema, start=1))
    cells = ", ".join(_cell(field) for field in schema)
    return Table(columns, (Reading(f"SELECT {cells} FROM read_parquet({literal(path)})", lambda: None),), _lines)


def _type(kind: pa.DataType, position: int) -> ColumnType:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        raise ReadError("unsupported_column", column=position)
    if pa.types.is_boolean(kind):
        return "boolean"
    if pa.types.is_integer(kind):
        return "integer"
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "number"
    if pa.types.is_nested(kind):
        return "json"
    return "string"


def _cell(field: pa.Field) -> str:
    name = identifier(field.name)
    if pa.types.is_nested(field.type):
        return f"CAST(to_json({name}) AS VARCHAR) AS {name}"
    if pa.types.is_floating(field.type):
        return f"CASE WHEN isnan({name}) THEN NULL ELSE CAST({name} AS VARCHAR) END AS {name}"
    return f"CAST({name} AS VARCHAR) AS {name}"


def _lines(rows: Collection[int]) -> Mapping[int, int]:
    return {}


PARQUET = Format(
    name="parquet",
    suffixes=(".parquet", ".pq"),
    content_type="application/vnd.apache.parquet",
    sniff_order=1,
    sniff=lambda beginning: beginning.startswith(b"PAR1"),
    open=_open,
)
