"""Facts of columns: what planning decides by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.files.limits import MAX_CLASSES
from tests.app.files.reading import parquet, read_profile


def facts(tmp_path: Path, *values: Any) -> dict[str, Any]:
    """Of a JSONL column with these values."""
    lines = "\n".join(json.dumps({"x": value, "n": n}) for n, value in enumerate(values))
    column, _ = read_profile(tmp_path, lines.encode(), "a.jsonl")["columns"]
    return column


@pytest.mark.parametrize(
    ("values", "elements"),
    [
        ([["b", "a"], ["a"], []], ["a", "b"]),
        ([["b", "a"], None, ["Größe"]], ["Größe", "a", "b"]),
        ([[]], []),
        ([["a"], ["b", 1]], None),
        ([[0, 7], [], [10, 0]], ["0", "10", "7"]),
        ([[0, -100]], ["-100", "0"]),
        ([[0], ["a"]], None),
        ([[0], [True]], None),
        ([[0, 1.0]], None),
        ([[0, None]], None),
        ([[10**64]], None),
        ([["a"], {"b": "c"}], None),
        ([["a"], "b"], None),
        ([["x" * 65]], None),
        ([["x\0y"]], None),
        ([[f"{n}", f"{n + 1}"] for n in range(MAX_CLASSES - 1)], sorted(map(str, range(MAX_CLASSES)))),
        ([[f"{n}", f"{n + 1}"] for n in range(MAX_CLASSES)], None),
        ([[["a"]]], None),
        (["a", "b"], None),
    ],
)
def test_elements_of_lists(tmp_path: Path, values: list[Any], elements: list[str] | None) -> None:
    assert facts(tmp_path, *values)["elements"] == elements


def test_lists_of_equal_lengths_are_told_from_others(tmp_path: Path) -> None:
    one, same, other = ([["a", "b"], []], [["x", "y"], []], [["a"], ["b"]])
    assert facts(tmp_path, *one)["lists"] == facts(tmp_path, *same)["lists"] is not None
    assert facts(tmp_path, *one)["lists"] != facts(tmp_path, *other)["lists"]
    many = [[f"{n}" for n in range(MAX_CLASSES + 1)]]
    assert facts(tmp_path, *many)["elements"] is None
    assert facts(tmp_path, *many)["lists"] is not None
    assert [facts(tmp_path, *each)["list_items"] for each in (one, [[]], [[1, 2], []])] == [
        "strings", "strings", "integers",
    ]  # fmt: skip
    assert facts(tmp_path, [1, 2], [])["lists"] == facts(tmp_path, *one)["lists"]
    for wrong in ([["a"], "b"], [["a"], [1]], [["a"], {"b": "c"}], [["a", 1]], ["a b"]):
        assert facts(tmp_path, *wrong)["lists"] is None


@pytest.mark.parametrize(
    ("values", "type_", "range_"),
    [
        ([3, -1, 2], "integer", [-1.0, 3.0]),
        ([3, 0.5, None], "number", [0.5, 3.0]),
        ([10**30, -1e-3], "number", [-0.001, 1e30]),
        (["4.5", "-0", "1e3", ".5", "+5."], "string", [-0.0, 1000.0]),
        (["4.5", 3], "mixed", [3.0, 4.5]),
        (["4.5", "n/a"], "string", None),
        (["4.5", "nan"], "string", None),
        (["1_000"], "string", None),
        ([" 1"], "string", None),
        (["٣"], "string", None),
        (["1e999"], "string", None),
        ([True, False], "boolean", None),
        ([None], "string", None),
    ],
)
def test_ranges_of_numbers(tmp_path: Path, values: list[Any], type_: str, range_: list[float] | None) -> None:
    found = facts(tmp_path, *values)
    assert (found["type"], found["range"]) == (type_, range_)
    if range_ is not None:
        numbers = [float(value) for value in values if value is not None]
        assert range_ == [min(numbers), max(numbers)]


def test_a_csv_column_of_lists_is_json_and_one_of_numbers_has_a_range(tmp_path: Path) -> None:
    data = 'labels,score,text\n"[""a"", ""b""]",1,[not a list\n"[""c""]",2.5,x\n,3,y\n'
    labels, score, text = read_profile(tmp_path, data.encode(), "a.csv")["columns"]
    assert (labels["type"], labels["elements"]) == ("json", ["a", "b", "c"])
    assert (score["type"], score["range"]) == ("string", [1.0, 3.0])
    assert (text["type"], text["elements"], text["range"]) == ("string", None, None)


def test_the_first_row_is_known_in_which_lists_are_not_equally_long(tmp_path: Path) -> None:
    made = parquet(
        tmp_path,
        tokens=[["a", "b"], ["c"], ["d"], ["e"]],
        tags=[[1, 0], [0], [], [1, 2]],
        chunks=[["x", "y"], ["z"], ["u"], ["v"]],
        texts=["a", "b", "c", "d"],
    )
    tokens, tags, chunks, texts = (column["unequal"] for column in read_profile(tmp_path, made, "a.parquet")["columns"])
    place = {"row": 3, "line": None}
    assert (tokens, tags) == ({"tags": place}, {"tokens": place, "chunks": place})
    assert (chunks, texts) == ({"tags": place}, None)


def test_lists_of_parquet_have_elements(tmp_path: Path) -> None:
    made = parquet(tmp_path, tags=[["B-PER", "O"], ["O"]], ids=[[1, 0], [0]], x=[1.5, float("nan")])
    tags, ids, x = read_profile(tmp_path, made, "a.parquet")["columns"]
    assert (tags["type"], tags["elements"]) == ("json", ["B-PER", "O"])
    assert (ids["type"], ids["list_items"], ids["elements"]) == ("json", "integers", ["0", "1"])
    assert ids["lists"] == tags["lists"]
    assert (x["range"], x["nulls"]["count"]) == ([1.5, 1.5], 1)
