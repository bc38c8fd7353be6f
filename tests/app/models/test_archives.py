"""Archives that are never stored: read by Python's tarfile and zipfile, whole and by every range."""

from __future__ import annotations

import hashlib
import io
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.models import archives
from tests.app.models.conftest import BUNDLE, Bundle, described


def whole(format_: str, bundle: Bundle) -> bytes:
    files = described(bundle)
    size = archives.describe(files, lambda path: iter([bundle[path]]))[format_]["bytes"]
    return b"".join(archives.read(format_, files, 0, size, reader(bundle)))


def reader(bundle: Bundle) -> Any:
    def read(path: str, start: int, end: int) -> Iterator[bytes]:
        assert 0 <= start < end <= len(bundle[path])
        for place in range(start, end, 1000):
            yield bundle[path][place : min(place + 1000, end)]

    return read


def test_tarfile_reads_the_tar() -> None:
    with tarfile.open(fileobj=io.BytesIO(whole("tar", BUNDLE)), mode="r:") as archive:
        members = archive.getmembers()
        assert [member.name for member in members] == [f"model/{path}" for path in BUNDLE]
        for member, data in zip(members, BUNDLE.values(), strict=True):
            extracted = archive.extractfile(member)
            assert extracted is not None
            assert extracted.read() == data
            assert (member.mode, member.mtime, member.uid, member.uname) == (0o644, 0, 0, "")


def test_the_tar_is_what_tarfile_itself_writes() -> None:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for path, data in BUNDLE.items():
            info = tarfile.TarInfo(f"model/{path}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert whole("tar", BUNDLE) == written.getvalue()


def test_zipfile_reads_the_zip() -> None:
    with zipfile.ZipFile(io.BytesIO(whole("zip", BUNDLE))) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"model/{path}" for path in BUNDLE]
        for info, data in zip(archive.infolist(), BUNDLE.values(), strict=True):
            assert archive.read(info) == data
            assert info.compress_type == zipfile.ZIP_STORED
            assert info.external_attr >> 16 == 0o100644


def test_the_systems_own_tools_unpack_them(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(whole("tar", BUNDLE))
    subprocess.run(["tar", "-xf", "a.tar"], cwd=tmp_path, check=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == BUNDLE


@pytest.mark.parametrize("format_", ["tar", "zip"])
def test_the_description_is_of_the_whole(format_: str) -> None:
    data = whole(format_, BUNDLE)
    described_as = archives.describe(described(BUNDLE), lambda path: iter([BUNDLE[path]]))[format_]
    assert described_as == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_a_file_that_changed_is_not_described() -> None:
    with pytest.raises(ValueError, match="not as long"):
        archives.describe(described(BUNDLE), lambda path: iter([BUNDLE[path], b"more"]))


@pytest.mark.parametrize("format_", ["tar", "zip"])
def test_any_range_is_a_slice_of_the_whole(format_: str) -> None:
    bundle = {"README.md": b"x" * 700, "config.json": b"", "model.safetensors": b"y" * 1300, "vocab.txt": b"z"}
    data = whole(format_, bundle)

    @settings(max_examples=300, deadline=None)
    @given(st.integers(0, len(data)), st.integers(0, len(data)))
    def check(one: int, other: int) -> None:
        start, end = sorted((one, other))
        assert b"".join(archives.read(format_, described(bundle), start, end, reader(bundle))) == data[start:end]

    check()


@pytest.mark.parametrize("size", [2**32 - 2, 2**32 - 1, 5 * 2**30])
def test_large_files_have_zip64_records(size: int) -> None:
    """Only the frames are made: zipfile reads the directory of a sparse file."""
    files = [
        {"path": "model.safetensors", "bytes": size, "crc32": 1},
        {"path": "vocab.txt", "bytes": 3, "crc32": 0x8C736521},
    ]
    first, second, last = archives.FORMATS["zip"].frames(files)
    sparse = Sparse([(0, first), (len(first) + size, second + b"foo" + last)])
    with zipfile.ZipFile(sparse) as archive:  # type: ignore[arg-type]
        large, small = archive.infolist()
        assert large.file_size == size
        assert small.header_offset == len(first) + size
        assert archive.read(small) == b"foo"
        with archive.open(large) as opened:
            assert opened.read(10) == bytes(10)


def test_large_files_fit_into_a_tar() -> None:
    files = [{"path": "model.safetensors", "bytes": 9 * 2**30, "crc32": 1}]
    header, _ = archives.FORMATS["tar"].frames(files)
    assert tarfile.TarInfo.frombuf(header, "utf-8", "strict").size == 9 * 2**30


class Sparse(io.RawIOBase):
    """A huge file of zeros with some pieces in it, in memory."""

    def __init__(self, pieces: list[tuple[int, bytes]]) -> None:
        self.pieces = pieces
        self.place = 0
        self.size = max(start + len(data) for start, data in pieces)

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = 0) -> int:
        self.place = offset + (0, self.place, self.size)[whence]
        return self.place

    def read(self, size: int = -1) -> bytes:
        end = self.size if size < 0 else min(self.place + size, self.size)
        assert end - self.place < 2**20
        found = bytearray(max(end - self.place, 0))
        for start, data in self.pieces:
            first, last = max(start, self.place), min(start + len(data), end)
            if first < last:
                found[first - self.place : last - self.place] = data[first - start : last - start]
        self.place = max(end, self.place)
        return bytes(found)


def test_equal_bundles_give_equal_bytes() -> None:
    assert whole("zip", BUNDLE) == whole("zip", dict(BUNDLE))
    assert struct.unpack_from("<HH", whole("zip", BUNDLE), 10) == (0, 0x21)  # 1 January 1980, not today
