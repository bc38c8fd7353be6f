"""Columns of Arrow batches, whatever file they came from: which types are read, and how a value becomes a cell.

Text stays text; numbers, booleans, dates and identifiers become it, lists and structs become JSON; NaN is a missing
cell. Bytes, alone or in a struct {bytes, path} as Hugging Face writes it, are images; the path is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from app.files.formats import images
from app.files.formats.interface import Column, ColumnType, Table, arrow_stream, check_names, identifier
from app.files.limits import MAX_ROWS
from app.files.problems import ReadError

#: Rows of one batch: text of the longest kind still fits the memory.
BATCH_ROWS = 1024
#: Levels of lists and structs in a column.
_MAX_DEPTH = 16
#: Numbers, dates and times that become text by SQL's own rules.
_SCALARS = (
    pa.types.is_null,
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_floating,
    lambda kind: pa.types.is_decimal(kind) and kind.bit_width <= 128,
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_date,
    pa.types.is_time,
    pa.types.is_timestamp,
    pa.types.is_duration,
    lambda kind: isinstance(kind, (pa.UuidType, pa.JsonType, pa.Bool8Type)),
)
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_map)
_BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)


def open_batches(
    connection: duckdb.DuckDBPyConnection,
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch],
    code: str,
    most_bytes: int,
) -> Table:
    """The table of these batches. code: of the ReadError for what a batch shows to be damaged; most_bytes: that a
    column of them may unpack to."""
    check_names(schema.names)
    if not schema.names:
        raise ReadError("no_rows")
    columns = tuple(Column(field.name, _type(field.type, n)) for n, field in enumerate(schema, start=1))
    handed = pa.schema([(field.name, _handed(field.type, c)) for field, c in zip(schema, columns, strict=True)])
    checked = _checked(batches, columns, handed, code, most_bytes * len(columns))
    cells = [_cell(field, column) for field, column in zip(handed, columns, strict=True)]
    return Table(columns, (arrow_stream(connection, handed, checked, cells),), lambda rows: _NO_LINES)


_NO_LINES: Mapping[int, int] = {}


def _checked(
    batches: Iterable[pa.RecordBatch], columns: tuple[Column, ...], schema: pa.Schema, code: str, most_bytes: int
) -> Iterator[pa.RecordBatch]:
    """Batches that DuckDB may read: it trusts offsets and indices, and takes any bytes for text."""
    row, unpacked = 0, 0
    try:
        for large in batches:
            if row + large.num_rows > MAX_ROWS:
                raise ReadError("too_many_rows")
            large.validate(full=True)
            for start in range(0, large.num_rows, BATCH_ROWS):
                batch = large.slice(start, BATCH_ROWS)
                arrays = [
                    _array(array, column, field.type, row, n)
                    for n, (array, column, field) in enumerate(zip(batch.columns, columns, schema, strict=True), 1)
                ]
                row += batch.num_rows
                unpacked += sum(map(_unpacked_bytes, arrays))
                if unpacked > most_bytes:
                    raise ReadError("unpacks_too_large")
                yield pa.record_batch(arrays, schema)
    except MemoryError:
        raise
    except (pa.ArrowException, OSError, ValueError, NotImplementedError):  # pyarrow's own words may quote the file
        raise ReadError(code) from None


def _array(array: pa.Array, column: Column, kind: pa.DataType, row: int, position: int) -> pa.Array:
    if column.type == "image":
        cells = [None if cell is None else _image(cell, row + n, position) for n, cell in enumerate(array, start=1)]
        return pa.array(cells, kind)
    if array.type != kind:
        array = array.cast(kind)
    found = _first_not_finite(array, nested=False)
    if found is not None:
        raise ReadError("number_not_finite", row=row + found + 1, column=position)
    return array


def _unpacked_bytes(array: pa.Array) -> int:
    if not pa.types.is_dictionary(array.type):
        return int(array.nbytes)
    return int(pc.sum(pc.take(pc.binary_length(array.dictionary), array.indices)).as_py() or 0)


def _image(cell: pa.Scalar, row: int, position: int) -> bytes | None:
    value: Any = cell.as_py()
    if isinstance(value, dict):
        if value["bytes"] is None and value.get("path") is not None:
            raise ReadError("not_an_image", row=row, column=position)  # a path into somebody else's folder
        value = value["bytes"]
    return None if value is None else images.canonical(value, row=row, column=position)


def _first_not_finite(array: pa.Array, *, nested: bool) -> int | None:
    """The first row that holds infinity, or NaN within a list or struct: JSON has neither."""
    kind = array.type
    if pa.types.is_floating(kind):
        bad = pc.invert(pc.is_finite(array)) if nested else pc.is_inf(array)
        found = pc.index(bad, value=True).as_py()
        return found if found >= 0 else None
    if pa.types.is_struct(kind):
        rows = [_first_not_finite(pc.struct_field(array, n), nested=True) for n in range(kind.num_fields)]
    elif any(is_(kind) for is_ in _LISTS):
        if pa.types.is_map(kind):
            array = array.cast(pa.list_(pa.struct([kind.key_field, kind.item_field])))
        found = _first_not_finite(pc.list_flatten(array), nested=True)
        rows = [None if found is None else pc.list_parent_indices(array)[found].as_py()]
    else:
        rows = []
    return min((row for row in rows if row is not None), default=None)


def _type(kind: pa.DataType, position: int) -> ColumnType:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
        if not any(is_(kind) for is_ in _SCALARS):
            raise ReadError("unsupported_column", column=position)
    if any(is_(kind) for is_ in _BYTES) or _is_image_struct(kind):
        return "image"
    if not _is_read(kind):
        raise ReadError("unsupported_column", column=position)
    if pa.types.is_boolean(kind) or isinstance(kind, pa.Bool8Type):
        return "boolean"
    if pa.types.is_integer(kind):
        return "integer"
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "number"
    if pa.types.is_nested(kind) or isinstance(kind, pa.JsonType):
        return "json"
    return "string"


def _is_image_struct(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind):
        return False
    fields = {field.name: field.type for field in kind}
    return (
        len(fields) == kind.num_fields
        and {"bytes"} <= fields.keys() <= {"bytes", "path"}
        and any(is_(fields["bytes"]) for is_ in _BYTES)
    )


def _is_read(kind: pa.DataType, depth: int = 0) -> bool:
    if any(is_(kind) for is_ in _SCALARS):
        return depth == 0 or not pa.types.is_float16(kind)
    nested = pa.types.is_struct(kind) or any(is_(kind) for is_ in _LISTS)
    return (
        nested and depth < _MAX_DEPTH and all(_is_read(kind.field(n).type, depth + 1) for n in range(kind.num_fields))
    )


def _handed(kind: pa.DataType, column: Column) -> pa.DataType:
    """As DuckDB gets it."""
    if column.type == "image":
        return pa.binary()
    if pa.types.is_dictionary(kind) and column.type != "string":
        kind = kind.value_type
    return pa.float32() if pa.types.is_float16(kind) else kind


def _cell(field: pa.Field, column: Column) -> str:
    name = identifier(field.name)
    if column.type == "image":
        return name
    if pa.types.is_nested(field.type):
        return f"CAST(to_json({name}) AS VARCHAR) AS {name}"
    if pa.types.is_floating(field.type):
        return f"CASE WHEN isnan({name}) THEN NULL ELSE CAST({name} AS VARCHAR) END AS {name}"
    return f"CAST({name} AS VARCHAR) AS {name}"
