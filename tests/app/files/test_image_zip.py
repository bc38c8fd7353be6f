"""Zip archives of images: classes by folder or by table, and archives that mean harm."""

from __future__ import annotations

import io
import stat
import struct
import zipfile
from pathlib import Path

import pytest

from app.files.formats import image_zip
from app.files.formats.images import canonical
from app.files.problems import Problem
from tests.app.files.reading import SECRET, parquet, problem_of, read_profile, rows_of
from tests.app.files.test_images import encoded, gradient

CAT, DOG = encoded(gradient(8, 8)), encoded(gradient(30, 8), "JPEG")


def packed(*entries: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return out.getvalue()


@pytest.mark.parametrize("name", ["pets.zip", "pets"])
@pytest.mark.parametrize("above", ["", "pets/", "data/train/"])
def test_a_folder_a_class(tmp_path: Path, name: str, above: str) -> None:
    junk = [("__MACOSX/pets/._1.png", b"x"), (f"{above}cat/.DS_Store", b"x"), (f"{above}dog/", b"")]
    entries = [(f"{above}dog/1.jpg", DOG), (f"{above}cat/2.png", CAT), (f"{above}cat/1.PNG", DOG), *junk]
    expected = [(canonical(DOG), "cat"), (canonical(CAT), "cat"), (canonical(DOG), "dog")]
    assert rows_of(tmp_path, packed(*entries), name) == expected
    first = (tmp_path / "rows.parquet").read_bytes()
    assert rows_of(tmp_path, packed(*entries[::-1], method=zipfile.ZIP_STORED), name) == expected
    assert (tmp_path / "rows.parquet").read_bytes() == first
    profile = read_profile(tmp_path, packed(*entries), name)
    image, label = profile["columns"]
    assert (profile["format"], image["type"], label["classes"]) == ("image_zip", "image", ["cat", "dog"])


TABLES = {
    "metadata.csv": b"file_name,label,patient\nb/2.png,dog,p1\n1.png,,p2\n",
    "metadata.tsv": b"label\tfile_name\tpatient\ndog\tb/2.png\tp1\n\t1.png\tp2\n",
    "metadata.jsonl": b'{"file_name": "b/2.png", "label": "dog", "patient": "p1"}\n'
    b'{"patient": "p2", "file_name": "1.png"}\n',
    "metadata.json": b'[{"file_name": "b/2.png", "label": "dog", "patient": "p1"}, '
    b'{"patient": "p2", "file_name": "1.png"}]',
}


@pytest.mark.parametrize("table", [*TABLES, "metadata.parquet"])
@pytest.mark.parametrize("above", ["", "pets/"])
def test_a_table_of_images(tmp_path: Path, table: str, above: str) -> None:
    data = TABLES.get(table) or parquet(
        tmp_path, file_name=["b/2.png", "1.png"], label=["dog", None], patient=["p1", "p2"]
    )
    archive = packed((f"{above}1.png", CAT), (f"{above}{table}", data), (f"{above}b/2.png", DOG))
    assert rows_of(tmp_path, archive, "pets.zip") == [(canonical(DOG), "dog", "p1"), (canonical(CAT), None, "p2")]
    profile = read_profile(tmp_path, archive, "pets.zip", "patient")
    assert profile["num_units"] == 2
    assert [column["name"] for column in profile["columns"]] == ["image", "label", "patient"]
    line = {"metadata.csv": 3, "metadata.tsv": 3, "metadata.jsonl": 2}.get(table)
    assert profile["columns"][1]["nulls"] == {"count": 1, "row": 2, "line": line}


CSV = b"file_name,label\n1.png,cat\n"


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ([], Problem("no_rows")),
        ([("1.png", CAT)], Problem("folders_unclear")),
        ([("cat/1.png", CAT), ("2.png", CAT)], Problem("folders_unclear")),
        ([("train/cat/1.png", CAT), ("test/cat/1.png", CAT)], Problem("folders_unclear")),
        ([("cat/1.png", CAT), ("cat/grey/1.png", CAT)], Problem("folders_unclear")),
        ([("cat/1.png", CAT), ("cat/2.png", b"<svg>")], Problem("not_an_image", row=2, column=1)),
        ([("cat/1.png", CAT), ("cat/2.png", CAT[:50])], Problem("invalid_image", row=2, column=1)),
        ([("cat/1.png", packed(("cat/1.png", CAT)))], Problem("nested_archive", row=1, column=1)),
        ([("cat/1.png.gz", b"\x1f\x8b\x08")], Problem("nested_archive", row=1, column=1)),
        ([("cat/1.png", bytes(2**25 + 1))], Problem("image_too_large", row=1, column=1)),
        ([("metadata.csv", CSV)], Problem("image_not_found", line=2, column=1)),
        ([("1.png", CAT), ("2.png", CAT), ("metadata.csv", CSV)], Problem("image_not_listed")),
        ([("1.png", CAT), ("metadata.csv", CSV + b"1.png,dog\n")], Problem("image_listed_twice", line=3, column=1)),
        ([("1.png", CAT), ("metadata.csv", CSV + b",dog\n")], Problem("image_not_found", line=3, column=1)),
        ([("1.png", CAT), ("metadata.csv", CSV + b"../1.png,dog\n")], Problem("image_not_found", line=3, column=1)),
        ([("1.png", CAT), ("metadata.csv", CSV + b"/etc/passwd,x\n")], Problem("image_not_found", line=3, column=1)),
        ([("1.png", CAT), ("metadata.csv", CSV + b"x\n")], Problem("too_few_cells", line=3, column=1)),
        ([("1.png", CAT), ("metadata.csv", b"file,label\n1.png,cat\n")], Problem("metadata_unclear")),
        ([("1.png", CAT), ("metadata.csv", CSV), ("b/metadata.csv", CSV)], Problem("metadata_unclear")),
        ([("1.png", CAT), ("metadata.csv", b"file_name,image\n1.png,x\n")], Problem("duplicate_column", column=2)),
        ([("1.png", CAT), ("metadata.parquet", b"PAR1")], Problem("invalid_parquet")),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, Problem) else "",
)
def test_archives_that_are_no_dataset(tmp_path: Path, entries: list[tuple[str, bytes]], problem: Problem) -> None:
    assert problem_of(tmp_path, packed(*entries), "pets.zip") == problem


@pytest.mark.parametrize(
    "name",
    [
        "../1.png",
        "cat/../../1.png",
        "/cat/1.png",
        "cat//1.png",
        "./cat/1.png",
        "C:/cat/1.png",
        "..\\1.png",
        "c\n/1.png",
    ],
)
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    inside = tmp_path / "deep" / "inside"
    inside.mkdir(parents=True)
    assert problem_of(inside, packed((name, CAT)), "pets.zip") == Problem("unsafe_name")
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"source"}


def test_names_cut_by_a_null_character_are_refused(tmp_path: Path) -> None:
    data = packed(("cat/1.png/evil", CAT)).replace(b"cat/1.png/evil", b"cat/1.png\0evil")
    assert problem_of(tmp_path, data, "pets.zip") == Problem("unsafe_name")


def linked() -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("cat/1.png")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def test_links_duplicates_and_encryption_are_refused(tmp_path: Path) -> None:
    assert problem_of(tmp_path, packed((linked(), b"/etc/passwd")), "a.zip") == Problem("link_in_archive")
    twice = packed(("cat/1.png", CAT), ("cat/2.png", CAT)).replace(b"cat/2.png", b"cat/1.png")
    assert problem_of(tmp_path, twice, "a.zip") == Problem("duplicate_entry")
    locked = bytearray(packed(("cat/1.png", CAT)))
    locked[locked.index(b"PK\x01\x02") + 8] |= 1
    assert problem_of(tmp_path, bytes(locked), "a.zip") == Problem("encrypted_archive")
    assert problem_of(tmp_path, packed(("cat/1.png", CAT), method=zipfile.ZIP_LZMA), "a.zip") == Problem(
        "unsupported_compression"
    )


def test_damage_is_refused(tmp_path: Path) -> None:
    whole = packed(("cat/1.png", CAT), method=zipfile.ZIP_STORED)
    for cut in (3, 20, len(whole) // 2, len(whole) - 1):
        assert problem_of(tmp_path, whole[:cut], "a.zip") == Problem("invalid_archive")
    data = bytearray(whole)
    data[data.index(CAT) + len(CAT) // 2] ^= 0xFF
    assert problem_of(tmp_path, bytes(data), "a.zip") == Problem("invalid_archive", row=1, column=1)  # its checksum
    other = whole.replace(b"cat/1.png", b"dog/1.png", 1)  # the two names of an entry differ
    assert problem_of(tmp_path, other, "a.zip") == Problem("invalid_archive", row=1, column=1)
    assert problem_of(tmp_path, b"GIF89a" + whole, "a.zip") == Problem("invalid_archive")  # two files in one
    assert problem_of(tmp_path, SECRET.encode(), "a.zip") == Problem("invalid_archive")


def test_entries_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    """The better zip bomb: many directory entries, one kernel."""
    data = packed(*((f"cat/{n}.png", CAT) for n in range(3)))
    begins = data.index(b"PK\x01\x02")
    directory, end = data[begins : data.index(b"PK\x05\x06")], data[data.index(b"PK\x05\x06") :]
    offset = struct.Struct("<I")
    entries = [bytearray(b"PK\x01\x02" + each) for each in directory.split(b"PK\x01\x02")[1:]]
    for entry in entries[1:]:
        offset.pack_into(entry, 42, 0)
    assert problem_of(tmp_path, data[:begins] + b"".join(entries) + end, "a.zip") == Problem("invalid_archive")
    # One entry that says it is so long that it quotes the next.
    entries = [bytearray(b"PK\x01\x02" + each) for each in directory.split(b"PK\x01\x02")[1:]]
    size = offset.unpack_from(entries[0], 20)[0]
    offset.pack_into(entries[0], 20, size + 60)
    assert problem_of(tmp_path, data[:begins] + b"".join(entries) + end, "a.zip") == Problem("invalid_archive")


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = packed(*((f"cat/{n}.png", bytes(2**24)) for n in range(20)))
    assert len(bomb) < 2**19
    assert problem_of(tmp_path, bomb, "a.zip") == Problem("unpacks_too_large")
    # A size that lies: no more is unpacked than it says, and what it says is not what the checksum is of.
    liar = packed(("cat/1.png", bytes(2**24)))
    for header, at in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        position = liar.index(header) + at
        liar = liar[:position] + struct.pack("<I", 64) + liar[position + 4 :]
    assert problem_of(tmp_path, liar, "a.zip") == Problem("invalid_archive", row=1, column=1)
    monkeypatch.setattr(image_zip, "MAX_ARCHIVE_ENTRIES", 2)
    many = packed(*((f"cat/{n}.png", CAT) for n in range(3)))
    assert problem_of(tmp_path, many, "a.zip") == Problem("too_many_entries")
