"""The owner's report: exact figures of the canonical rows, for the data's owner only. Nothing of it is private.

Computed once, by the reading process, and stored beside the rows; no budget covers it and no job reads it.
"""

# ruff: noqa: S608 - names are quoted, and the database is this process's own memory

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb

from app.catalog.tasks import TASKS
from app.files.formats.interface import identifier, literal

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
_CELLS_AT_ONCE = 1024


def owner_report(connection: duckdb.DuckDBPyConnection, profile: Mapping[str, Any], rows: Path) -> dict[str, Any]:
    """{num_rows, num_units, records_per_unit, inferred_tasks, duplicate_rows, columns: [{name, type, nulls, lengths,
    counts, element_counts, range}]}.

    inferred_tasks: those whose every required column has a name that jobs infer it from; the base model decides.
    lengths: {quantile: characters of a cell}, the smallest length that so large a share of the cells does not exceed.
    counts, element_counts: of the values in `classes` and `elements` (see `app.files.profile`), the most frequent
    first. duplicate_rows: rows that equal an earlier one in every column; null where there are too many to compare.
    """
    return {
        "num_rows": profile["num_rows"],
        "num_units": profile["num_units"],
        "records_per_unit": profile["records_per_unit"],
        "inferred_tasks": _tasks([str(column["name"]).lower() for column in profile["columns"]]),
        "duplicate_rows": _duplicates(connection, profile, rows),
        "columns": [_column(connection, column, rows) for column in profile["columns"]],
    }


def _tasks(names: Sequence[str]) -> list[str]:
    return [
        task.type
        for task in TASKS.values()
        if all(not role.required or any(name in names for name in role.names) for role in task.columns)
    ]


def _column(connection: duckdb.DuckDBPyConnection, facts: Mapping[str, Any], rows: Path) -> dict[str, Any]:
    cell, table = identifier(facts["name"]), f"read_parquet({literal(rows)})"
    report = {"name": facts["name"], "type": facts["type"], "nulls": facts["nulls"]["count"]}
    report |= {"lengths": None, "counts": None, "element_counts": None, "range": facts["range"]}
    if facts["type"] == "image":
        return report
    report["lengths"] = quantiles(
        connection.execute(
            f"SELECT length({cell}) AS size, count(*) FROM {table} WHERE {cell} IS NOT NULL GROUP BY size ORDER BY size"
        ).fetchall()
    )
    if facts["classes"] is not None:
        found = connection.execute(f"SELECT {cell}, count(*) FROM {table} WHERE {cell} IS NOT NULL GROUP BY {cell}")
        report["counts"] = _most_frequent_first(dict(found.fetchall()))
    if facts["elements"] is not None:
        elements: Counter[str] = Counter()
        cells = connection.execute(f"SELECT {cell} FROM {table} WHERE {cell} IS NOT NULL")
        while batch := cells.fetchmany(_CELLS_AT_ONCE):
            for (text,) in batch:
                elements.update(map(str, json.loads(text)))
        report["element_counts"] = _most_frequent_first(elements)
    return report


def quantiles(histogram: Sequence[tuple[int, int]]) -> dict[str, int] | None:
    """Exact quantiles of [(value, how often)], ascending by value; None of nothing."""
    total = sum(times for _, times in histogram)
    if total == 0:
        return None
    found, seen = {}, 0
    wanted = list(QUANTILES)
    for value, times in histogram:
        seen += times
        while wanted and seen >= max(1, math.ceil(wanted[0] * total)):
            found[f"{wanted.pop(0):g}"] = value
    return found


def _most_frequent_first(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda each: (-each[1], each[0])))


def _duplicates(connection: duckdb.DuckDBPyConnection, profile: Mapping[str, Any], rows: Path) -> int | None:
    # 128 bits stand for a row. A cell's digest has 32 characters and a missing cell one: neighbours stay apart.
    cells = ", ".join(f"coalesce(md5({identifier(column['name'])}), '-')" for column in profile["columns"])
    try:
        distinct = connection.execute(
            f"SELECT count(*) FROM (SELECT 1 FROM read_parquet({literal(rows)}) GROUP BY md5_number(concat({cells})))"
        ).fetchone()
    except duckdb.OutOfMemoryException:  # the file is good all the same
        return None
    assert distinct is not None  # an aggregate has one row
    return int(profile["num_rows"] - distinct[0])
