"""Datasets as people have them, and as they break them: canonical rows, or a code and a place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.files.limits import MAX_CELL_BYTES, MAX_COLUMNS, MAX_ROW_BYTES, ReaderLimits, limits_for
from app.files.problems import PROBLEMS, Problem
from tests.app.files.reading import SECRET, parquet, problem_of, read_profile, rows_of

EXPECTED = [("good, really", "pos"), ('said "no"\ntwice', "neg"), ("Größe ✓", None), (None, "pos")]


@pytest.mark.parametrize(
    ("filename", "data"),
    [
        ("a.csv", 'text,label\n"good, really",pos\n"said ""no""\ntwice",neg\nGröße ✓,\n,pos\n'),
        ("a.csv", 'text,label\r\n"good, really",pos\r\n"said ""no""\ntwice",neg\r\nGröße ✓,\r\n"",pos'),
        ("a.csv", '\ufefftext;label\n"good, really";pos\n"said ""no""\ntwice";neg\n\nGröße ✓;\n;pos\n'),
        ("a.CSV", ' text ,"label"\n"good, really",pos\n"said ""no""\ntwice",neg\nGröße ✓,\n,pos\n'),
        ("a.tsv", 'text\tlabel\ngood, really\tpos\n"said ""no""\ntwice"\tneg\nGröße ✓\t\n\tpos\n'),
        ("noending", 'text\tlabel\ngood, really\tpos\n"said ""no""\ntwice"\tneg\nGröße ✓\t\n\tpos\n'),
        (
            "a.jsonl",
            '{"text": "good, really", "label": "pos"}\n{"label": "neg", "text": "said \\"no\\"\\ntwice"}\n\n'
            '{"text": "Größe ✓"}\n{"text": null, "label": "pos"}',
        ),
        (
            "a.data",
            '\ufeff{"text": "good, really", "label": "pos"}\r\n{"label": "neg", "text": "said \\"no\\"\\ntwice"}\r\n'
            '{"text": "Gr\\u00f6\\u00dfe ✓", "label": null}\r\n{"label": "pos"}\r\n',
        ),
    ],
)
def test_the_same_rows_come_out_of_every_spelling(tmp_path: Path, filename: str, data: str) -> None:
    assert rows_of(tmp_path, data.encode(), filename) == EXPECTED


def test_parquet_gives_the_same_rows_and_bytes(tmp_path: Path) -> None:
    texts, labels = zip(*EXPECTED, strict=True)
    made = parquet(tmp_path, text=list(texts), label=pa.array(labels).dictionary_encode())
    assert rows_of(tmp_path, made, "a.parquet") == EXPECTED
    from_parquet = (tmp_path / "rows.parquet").read_bytes()
    lines = "\n".join(json.dumps({"text": text, "label": label}) for text, label in EXPECTED)
    assert rows_of(tmp_path, lines.encode(), "a.jsonl") == EXPECTED
    assert (tmp_path / "rows.parquet").read_bytes() == from_parquet


def test_values_become_text_and_types_are_remembered(tmp_path: Path) -> None:
    data = b'{"a": 1, "b": true, "c": 0.5, "d": [1, {"x": "y"}], "e": "s", "f": 1}\n{"a": 2, "c": 3, "f": "x"}\n'
    assert rows_of(tmp_path, data, "a.jsonl") == [
        ("1", "true", "0.5", '[1,{"x":"y"}]', "s", "1"),
        ("2", None, "3", None, None, "x"),
    ]
    types = [column["type"] for column in read_profile(tmp_path, data, "a.jsonl")["columns"]]
    assert types == ["integer", "boolean", "number", "json", "string", "mixed"]

    made = parquet(tmp_path, a=[1, 2], b=[True, None], c=[0.5, float("nan")], d=[[1], [2, 3]])
    assert rows_of(tmp_path, made, "a.parquet") == [("1", "true", "0.5", "[1]"), ("2", None, None, "[2,3]")]
    types = [column["type"] for column in read_profile(tmp_path, made, "a.parquet")["columns"]]
    assert types == ["integer", "boolean", "number", "json"]


def test_the_profile_has_classes_and_the_place_of_the_first_missing_cell(tmp_path: Path) -> None:
    data = b'text,label\n"two\nlines",b\n\nx,a\n,b\n,\n'
    profile = read_profile(tmp_path, data, "a.csv")
    assert profile["format"] == "csv"
    assert profile["num_rows"] == 4
    text, label = profile["columns"]
    assert text["nulls"] == {"count": 2, "row": 3, "line": 6}
    assert label == {
        "name": "label",
        "type": "string",
        "distinct": 2,
        "classes": ["a", "b"],
        "lists": None,
        "unequal": None,
        "list_items": None,
        "elements": None,
        "chat": None,
        "range": None,
        "nulls": {"count": 1, "row": 4, "line": 7},
    }


@pytest.mark.parametrize(("count", "distinct"), [(1000, 1000), (1001, None), (5000, None)])
def test_a_column_of_many_values_has_no_classes(tmp_path: Path, count: int, distinct: int | None) -> None:
    data = "text\n" + "".join(f"value {number % count}\n" for number in range(6000))
    (column,) = read_profile(tmp_path, data.encode(), "a.csv")["columns"]
    assert column["distinct"] == distinct
    assert (column["classes"] is None) == (distinct is None)


def test_long_values_are_no_classes(tmp_path: Path) -> None:
    (column,) = read_profile(tmp_path, b"text\n" + b"x" * 65 + b"\n", "a.csv")["columns"]
    assert (column["distinct"], column["classes"]) == (1, None)


def test_a_tsv_without_quoting_keeps_its_quotes(tmp_path: Path) -> None:
    data = b'text\tlabel\n"Ha!" he said\tpos\n5" disk\tneg\n'
    assert rows_of(tmp_path, data, "a.tsv") == [('"Ha!" he said', "pos"), ('5" disk', "neg")]


@pytest.mark.parametrize(
    ("filename", "data", "code", "line", "column"),
    [
        ("a.csv", b"", "empty_file", None, None),
        ("a.csv", b"\xef\xbb\xbf \n\n", "empty_file", None, None),
        ("a.bin", b"no header here\nnothing\n", "format_unknown", None, None),
        ("a.csv", b"text,label\n", "no_rows", None, None),
        ("a.csv", b"text,,label\na,b,c\n", "no_header", 1, 2),
        ("a.csv", b"\ntext,label\na,b\n", "no_header", 1, 1),
        ("a.csv", b'"text,label\na,b\n', "no_header", 1, None),
        ("a.csv", b"Ludwig-was-here again " * 4 + b",pos\na,neg\n", "no_header", 1, 1),
        ("a.csv", b"Ludwig-was-here,pos\nx,neg\ny,pos\n", "no_header", 1, 2),
        ("a.csv", b"text,Text\na,b\n", "duplicate_column", 1, 2),
        ("a.csv", ",".join(f"c{n}" for n in range(MAX_COLUMNS + 1)).encode() + b"\n1\n", "too_many_columns", 1, None),
        ("a.csv", b'text,label\n"two\nlines",b\nLudwig-was-here\nc,d\n', "too_few_cells", 4, 1),
        ("a.csv", b'text,label\n"two\r\nlines",b\r\nLudwig-was-here,x,y\r\nc,d\r\n', "too_many_cells", 4, 3),
        ("a.csv", b'text,label\na,b\nc,"Ludwig-was-here"x\ne,f\n', "broken_quotes", 3, None),
        ("a.csv", b'text,label\na,b\nc,"Ludwig-was-here\ne,f\n', "broken_quotes", 3, None),
        ("a.csv", b"text,label\na,b\nLudwig-was-here\xff,d\n", "undecodable_bytes", 3, None),
        ("a.csv", b"te\xffxt,label\na,b\n", "undecodable_bytes", 1, None),
        ("a.csv", "text,label\na,b\n".encode("utf-16"), "undecodable_bytes", 1, None),
        ("a.csv", b"text,label\n\na,b\nc\0,d\n", "null_character", 4, 1),
        ("a.csv", b"text,label\na,b\nc," + b"x" * (MAX_CELL_BYTES + 1) + b"\n", "cell_too_long", 3, None),
        ("a.csv", b"text,label\na,b\nc," + "é".encode() * (MAX_CELL_BYTES // 2 + 1) + b"\n", "cell_too_long", 3, 2),
        ("a.csv", b"text,label\na,b\nc," + b"x" * (MAX_ROW_BYTES + 1) + b"\n", "row_too_long", 3, None),
        ("a.tsv", b'text\tlabel\na\tb\n"x\n', "broken_quotes", 3, None),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": Ludwig-was-here}\n', "invalid_json", 3, 10),
        ("a.jsonl", b'{"text": "a"}\n{"text": NaN}\n', "invalid_json", 2, None),
        ("a.jsonl", b'{"text": ' + b"[" * 200_000 + b"\n", "invalid_json", 1, None),
        ("a.jsonl", b'{"text": ' + b"9" * 10_000 + b"}\n", "invalid_json", 1, None),
        ("a.jsonl", b'{"text": "a"}\n["Ludwig-was-here"]\n', "not_an_object", 2, None),
        ("a.jsonl", b'{"text": "a"}\n{"text": "Ludwig-was-here\xff"}\n', "undecodable_bytes", 2, 26),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', "undecodable_bytes", 2, None),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "\\u0000"}\n', "null_character", 3, 1),
        ("a.jsonl", b'{"text": "a"}\n{"text": "' + b"x" * MAX_ROW_BYTES + b'"}\n', "row_too_long", 2, None),
        ("a.jsonl", b'{"text": "a"}\n{"": "Ludwig-was-here"}\n', "column_name_invalid", 2, 2),
        ("a.jsonl", b"{}\n{}\n", "no_rows", None, None),
        ("a.parquet", b"PAR1 this is none", "invalid_parquet", None, None),
        ("a.parquet", b"text,label\na,b\n", "invalid_parquet", None, None),
    ],
)
def test_bad_input_has_a_code_and_a_place(
    tmp_path: Path, filename: str, data: bytes, code: str, line: int | None, column: int | None
) -> None:
    assert problem_of(tmp_path, data, filename) == Problem(code, line, column)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"text,who\na,p1\nb,p2\n", Problem("unit_column_not_found")),
        (b'text,id\n"a\nb",p1\n\nLudwig-was-here,\nc,\n', Problem("unit_missing", 5, 2)),
        (b'{"text": "a", "id": "p1"}\n\n{"text": "b"}\n', Problem("unit_missing", 3, 2)),
        (b'{"text": "a", "id": "p1"}\n{"text": "b", "id": ""}\n', Problem("unit_missing", 2, 2)),
        (b"text,id\na,p1\nb,Ludwig-was-here \n", Problem("unit_padded", 3, 2)),
        ("text,id\na,p1\nb,\u00a0p1\n".encode(), Problem("unit_padded", 3, 2)),
        (b"text,id\na,p1\nb, \n", Problem("unit_padded", 3, 2)),
    ],
)
def test_every_row_is_somebodys(tmp_path: Path, data: bytes, problem: Problem) -> None:
    name = "a.jsonl" if data.startswith(b"{") else "a.csv"
    assert problem_of(tmp_path, data, name, "id") == problem
    assert read_profile(tmp_path, data, name)["num_units"] == read_profile(tmp_path, data, name)["num_rows"]


def test_units_and_their_records_are_counted(tmp_path: Path) -> None:
    many = ["long"] * 300 + ["longer"] * 1000
    data = "text,id\n" + "".join(f"x{n},{who}\n" for n, who in enumerate(["a", "A", "b", "b", "c c", *many, "b"]))
    profile = read_profile(tmp_path, data.encode(), "a.csv", "id")
    assert (profile["num_rows"], profile["num_units"]) == (1306, 6)
    # a, A and "c c" have one record, b has three; from 256 on they are counted together.
    assert profile["records_per_unit"] == [[1, 3, 3], [3, 1, 3], [256, 2, 1300]]
    assert pq.read_table(tmp_path / "rows.parquet").column("id").to_pylist()[:3] == ["a", "A", "b"]


def test_numbers_are_units_by_their_text(tmp_path: Path) -> None:
    made = parquet(tmp_path, text=["a", "b", "c"], id=[7, 8, 7])
    assert read_profile(tmp_path, made, "a.parquet", "id")["num_units"] == 2
    missing = parquet(tmp_path, text=["a", "b", "c"], id=[7, None, 7])
    assert problem_of(tmp_path, missing, "a.parquet", "id") == Problem("unit_missing", column=2, row=2)


def test_lines_are_right_far_into_a_file_with_quoted_newlines(tmp_path: Path) -> None:
    data = b"text,label\n" + b'"a\nb",pos\n' * 300_000 + b"broken\n" + b'"a\nb",pos\n' * 10
    assert problem_of(tmp_path, data, "a.csv") == Problem("too_few_cells", 600_002, 1)


@pytest.mark.parametrize("cut", [8, 40, 200, -1])
def test_damaged_parquet_is_refused(tmp_path: Path, cut: int) -> None:
    made = bytearray(parquet(tmp_path, text=[f"{SECRET} {n}" for n in range(1000)]))
    damaged = bytes(made[:cut]) if cut == -1 else bytes(made[:cut]) + b"\xff" * 64 + bytes(made[cut + 64 :])
    assert problem_of(tmp_path, damaged, "a.parquet").code == "invalid_parquet"


def test_null_characters_of_parquet_have_no_line(tmp_path: Path) -> None:
    assert problem_of(tmp_path, parquet(tmp_path, a=["x", "y\0"]), "a.parquet") == Problem(
        "null_character", column=1, row=2
    )


def test_every_problem_has_words() -> None:
    assert Problem("too_few_cells", 4, 1).message == f"Line 4, column 1: {PROBLEMS['too_few_cells']}"
    assert all(Problem(code).message.endswith(".") for code in PROBLEMS)


# --- the process ---------------------------------------------------------------------------------------------------


def run_reader(
    tmp_path: Path, data: bytes, filename: str, limits: ReaderLimits, parent: int | None = None
) -> tuple[int, dict[str, Any] | None]:
    (tmp_path / "source").write_bytes(data)
    output = tmp_path / "output"
    output.mkdir(exist_ok=True)
    (output / "profile.json").unlink(missing_ok=True)
    job = {
        "source": str(tmp_path / "source"),
        "filename": filename,
        "unit_column": None,
        "rows": str(output / "rows.parquet"),
        "profile": str(output / "profile.json"),
        "report": str(output / "report.json"),
        "progress": str(output / "progress"),
        "limits": asdict(limits),
        "parent": os.getpid() if parent is None else parent,
    }
    done = subprocess.run([sys.executable, "-m", "app.files.reader", json.dumps(job)], capture_output=True, check=False)
    profile = output / "profile.json"
    return done.returncode, json.loads(profile.read_text()) if profile.exists() else None


def test_a_reader_whose_worker_is_gone_reads_nothing(tmp_path: Path) -> None:
    assert run_reader(tmp_path, b"text\na\n", "a.csv", limits_for(7), parent=1) == (1, None)
    assert not (tmp_path / "output" / "rows.parquet").exists()


def test_the_reader_keeps_its_limits(tmp_path: Path) -> None:
    data = b"text\n" + b"word " * 200_000 + b"\n"
    generous = limits_for(len(data))
    code, profile = run_reader(tmp_path, data, "a.csv", generous)
    assert (code, profile and profile["num_rows"]) == (0, 1)

    # A megabyte of address space is less than the imports have mapped already: nothing can be added, which a file that
    # is larger than what lies free among it needs.
    tight = ReaderLimits(2**20, generous.cpu_seconds, generous.wall_seconds, generous.written_bytes)
    _, profile = run_reader(tmp_path, b"text\n" + b"a few words in a row\n" * 3_000_000, "a.csv", tight)
    assert profile is None or "problem" in profile


def test_a_bomb_is_refused(tmp_path: Path) -> None:
    """A Parquet file of some kilobytes that unpacks to a gigabyte of text."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 10_000, pa.int32()), pa.array(["x" * 100_000]))
    pq.write_table(pa.table({"text": column}), tmp_path / "bomb.parquet", compression="zstd")
    data = (tmp_path / "bomb.parquet").read_bytes()
    assert len(data) < 2**17
    code, profile = run_reader(tmp_path, data, "a.parquet", limits_for(len(data)))
    assert code == 0
    assert profile is not None
    assert profile["problem"]["code"] == "unpacks_too_large"


def test_the_reader_cannot_fill_the_disk(tmp_path: Path) -> None:
    made = parquet(tmp_path, text=[f"{n * 7919 % 99991} {n}" for n in range(50_000)])
    limits = limits_for(len(made))
    run_reader(tmp_path, made, "a.parquet", ReaderLimits(limits.memory_bytes, 20, 60.0, 2**16))
    assert sum(path.stat().st_size for path in (tmp_path / "output").iterdir()) <= 2**17


def test_quoted_text_that_looks_like_rows_stays_one_cell(tmp_path: Path) -> None:
    """What DuckDB's own reader gets wrong at the edges of its blocks."""
    cell = b'"' + b"a,b\n" * 5000 + b'"'
    profile = read_profile(tmp_path, b"text,label\n" + (cell + b",pos\n") * 1000, "a.csv")
    assert profile["num_rows"] == 1000
    assert profile["columns"][0]["distinct"] == 1
    data = b"text,label\n" + (cell + b",pos\n") * 10 + b'last,"neg'
    assert problem_of(tmp_path, data, "a.csv") == Problem("broken_quotes", 2 + 10 * 5001)
