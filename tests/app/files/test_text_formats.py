"""JSON arrays, CoNLL, and compressed files: the same rows, and exact places of what is wrong."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from app.files.formats import json_array
from app.files.limits import MAX_ROW_BYTES
from app.files.problems import Problem
from tests.app.files.reading import SECRET, parquet, problem_of, read_profile, rows_of

Pack = Callable[[bytes], bytes]


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


PACKS: dict[str, Pack] = {"gz": gzip.compress, "zst": zstd}

RECORDS: list[dict[str, Any]] = [
    {"text": 'said "no"\n[twice]', "tags": ["a", "b"], "n": 1},
    {"text": "Größe ✓", "tags": [], "n": 2.5},
    {"n": None, "tags": None},
]
ROWS = [('said "no"\n[twice]', '["a","b"]', "1"), ("Größe ✓", "[]", "2.5"), (None, None, None)]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "unnamed"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_a_json_array_gives_the_rows_of_its_lines(tmp_path: Path, indent: int | None, name: str, bom: str) -> None:
    lines = "\n".join(json.dumps(record) for record in RECORDS).encode()
    assert rows_of(tmp_path, lines, "a.jsonl") == ROWS
    digest = (tmp_path / "rows.parquet").read_bytes()
    array = bom + json.dumps(RECORDS, indent=indent, ensure_ascii=indent is None)
    assert rows_of(tmp_path, array.encode(), name) == ROWS
    assert read_profile(tmp_path, array.encode(), name)["format"] == "json"
    assert (tmp_path / "rows.parquet").read_bytes() == digest
    assert rows_of(tmp_path, lines, "a.json") == ROWS  # many tools call lines so


@pytest.mark.parametrize("piece", [1, 7, 100])
def test_objects_cross_the_pieces_in_which_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(json_array, "_PIECE", piece)
    for indent in (None, 1):
        assert rows_of(tmp_path, json.dumps(RECORDS, indent=indent).encode(), "a.json") == ROWS
    text = '[{"a": 1},\n {"a": "x"},\n  {"a": Ludwig-was-here}]'
    assert problem_of(tmp_path, text.encode(), "a.json") == Problem("invalid_json", line=3, column=9, row=3)


def test_an_array_larger_than_a_piece(tmp_path: Path) -> None:
    records = [{"text": f"{n} " * (n % 700), "n": n} for n in range(3000)]
    assert rows_of(tmp_path, json.dumps(records).encode(), "a.json") == [(r["text"], str(r["n"])) for r in records]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"[]", Problem("no_rows")),
        (b"[{}]", Problem("no_rows")),
        (b'"Ludwig-was-here"', Problem("invalid_json", 1, 1)),
        (b"[", Problem("invalid_json", 1, 2, 1)),
        (b'[{"a": 1}', Problem("invalid_json", 1, 10, 1)),
        (b'[{"a": 1},]', Problem("invalid_json", 1, 11, 2)),
        (b'[{"a": 1}\n {"a": 2}]', Problem("invalid_json", 2, 2, 1)),
        (b'[{"a": 1}]\n\nLudwig-was-here', Problem("invalid_json", 3, 1, 1)),
        (b'[{"a": 1}] [{"a": 2}]', Problem("invalid_json", 1, 12, 1)),
        (b'[{"a": 1},\n["Ludwig-was-here"]]', Problem("not_an_object", 2, row=2)),
        (b'[{"a": 1},\n\n17]', Problem("not_an_object", 3, row=2)),
        (b'[{"a": NaN}]', Problem("invalid_json", 1, row=1)),
        (b'[{"a": 1e999}]', Problem("number_not_finite", 1, row=1)),
        (b'[{"a": ' + b"9" * 5000 + b"}]", Problem("invalid_json", 1, row=1)),
        (b'[{"a": ' + b"[" * 200_000, Problem("invalid_json", 1, row=1)),
        (b'[{"a": "\\udc00"}]', Problem("undecodable_bytes", 1, row=1)),
        (b'[{"a": "x"},\n{"a": "\xff"}]', Problem("undecodable_bytes", 2)),
        (b'[{"a": "x"},\n{"a": "\\u0000"}]', Problem("null_character", column=1, row=2)),
        (b'[{"a": "' + b"x" * (2 * MAX_ROW_BYTES) + b'"}]', Problem("row_too_long", 1, row=1)),
        (b'[{"a": "' + b"x" * (MAX_ROW_BYTES + 9) + b'"}]', Problem("row_too_long", 1, row=1)),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_wrong_with_an_array_has_its_place(tmp_path: Path, data: bytes, problem: Problem) -> None:
    assert problem_of(tmp_path, data, "a.json") == problem


CONLL = """-DOCSTART- -X- O O

EU NNP I-NP B-ORG
rejects VBZ I-VP O
# # I-NP O

-DOCSTART- -X- O O

# sent_id = 1
Peter NNP I-NP B-PER
"""


@pytest.mark.parametrize("name", ["eng.conll", "eng.testa"])
@pytest.mark.parametrize("change", [str, lambda text: text.replace(" ", "\t"), lambda text: text.replace("\n", "\r\n")])
def test_conll(tmp_path: Path, name: str, change: Callable[[str], str]) -> None:
    text = change(CONLL if name.endswith("conll") else CONLL.replace("# sent_id = 1\n", ""))
    assert rows_of(tmp_path, text.encode(), name) == [
        ('["EU","rejects","#"]', '["B-ORG","O","O"]'),
        ('["Peter"]', '["B-PER"]'),
    ]
    tokens, tags = read_profile(tmp_path, text.encode(), name)["columns"]
    assert (tokens["name"], tokens["type"], tags["name"], tags["type"]) == ("tokens", "json", "tags", "json")
    assert tags["elements"] == ["B-ORG", "B-PER", "O"]


def test_a_token_may_be_a_space_of_its_own_kind(tmp_path: Path) -> None:
    assert rows_of(tmp_path, "a\u3000b\tO\n\u00a0\tO\n".encode(), "a.conll") == [('["a\u3000b","\u00a0"]', '["O","O"]')]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\n-DOCSTART- O\n\n", Problem("no_rows")),
        (b"a O\n\nLudwig-was-here\n", Problem("too_few_cells", 3, 1)),
        (b"Ludwig-was-here\n", Problem("too_few_cells", 1, 1)),
        (b"a O\nb X O\n", Problem("too_many_cells", 2, 3)),
        (b"a\tO\nb\t\n", Problem("too_few_cells", 2, 2)),
        (b"a\tO\n\tO\n", Problem("too_few_cells", 2, 2)),
        (b"a O\n\xff O\n", Problem("undecodable_bytes", 2)),
        (b"a O\nb\0 O\n", Problem("null_character", 2)),
        (b"x\n" + b"a O\n", Problem("too_few_cells", 1, 1)),
        (b"a O\n\nb O\n" + (b"x" * 2**20 + b" O\n") * (MAX_ROW_BYTES // 2**20), Problem("row_too_long", 3)),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_wrong_with_conll_has_its_place(tmp_path: Path, data: bytes, problem: Problem) -> None:
    assert problem_of(tmp_path, data, "a.conll") == problem


@pytest.mark.parametrize("suffix", PACKS)
def test_every_text_and_table_may_be_packed(tmp_path: Path, suffix: str) -> None:
    pack = PACKS[suffix]
    lines = "\n".join(json.dumps(record) for record in RECORDS).encode()
    assert rows_of(tmp_path, pack(lines), f"a.jsonl.{suffix}") == ROWS
    assert rows_of(tmp_path, pack(lines), "a.jsonl") == ROWS  # by what it is, whatever it is called
    assert rows_of(tmp_path, pack(lines), f"a.{suffix}") == ROWS
    assert rows_of(tmp_path, pack(lines[:40]) + pack(lines[40:]), f"a.jsonl.{suffix.upper()}") == ROWS
    csv = b"text,label\ngood,pos\n"
    assert rows_of(tmp_path, pack(csv), f"a.csv.{suffix}") == [("good", "pos")]
    made = parquet(tmp_path, text=["good"], label=["pos"])
    assert rows_of(tmp_path, pack(made), f"a.parquet.{suffix}") == [("good", "pos")]
    assert problem_of(tmp_path, pack(b"text,label\na,b\nc\n"), f"a.csv.{suffix}") == Problem("too_few_cells", 3, 1)


@pytest.mark.parametrize("suffix", PACKS)
def test_damaged_and_nested_packs_are_refused(tmp_path: Path, suffix: str) -> None:
    pack, name = PACKS[suffix], f"a.csv.{suffix}"
    packed = pack(b"text,label\n" + b"".join(b"%d %s,b\n" % (n * n, SECRET.encode()) for n in range(9999)))
    assert problem_of(tmp_path, packed[:-1], name) == Problem("invalid_compression")
    assert problem_of(tmp_path, packed[: len(packed) // 2], name) == Problem("invalid_compression")
    assert problem_of(tmp_path, packed + b"text,label", name) == Problem("invalid_compression")
    assert problem_of(tmp_path, b"text,label\na,b\n", name) == Problem("invalid_compression")
    assert problem_of(tmp_path, b"", name) == Problem("empty_file")
    assert problem_of(tmp_path, pack(b""), name) == Problem("empty_file")
    for inner in PACKS.values():
        assert problem_of(tmp_path, pack(inner(b"text,label\na,b\n")), name) == Problem("nested_archive")
    assert problem_of(tmp_path, pack(b"PK\x03\x04"), name) == Problem("nested_archive")


def test_frames_that_zstandard_has_for_others_are_skipped(tmp_path: Path) -> None:
    """As pzstd writes one before each of its frames, and the seekable format a table behind them."""
    skipped, rows = b"\x5e\x2a\x4d\x18\x04\0\0\0abcd", zstd(b"text,label\na,x\n")
    for packed in (skipped + rows, rows + skipped, skipped + rows + skipped + zstd(b"b,y\n")):
        assert rows_of(tmp_path, packed, "a.csv.zst")[0] == ("a", "x")
    for cut in (skipped[:-1], skipped + rows[:-1], rows + skipped[:-1]):
        assert problem_of(tmp_path, cut, "a.csv.zst") == Problem("invalid_compression")


@pytest.mark.parametrize("suffix", PACKS)
def test_a_pack_that_would_fill_the_disk_is_refused(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.files.formats.packed.max_unpacked_bytes", lambda size: 5_000_000 + 20 * size)
    packed = PACKS[suffix](b"text\n" + b"x" * 10_000_000)
    assert problem_of(tmp_path, packed, f"a.csv.{suffix}") == Problem("unpacks_too_large")
    assert (tmp_path / "unpacked").stat().st_size <= 5_000_000 + 20 * len(packed)
