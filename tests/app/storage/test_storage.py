"""Every store keeps the interface's promises."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from obstore.store import from_url

from app.storage import Storage, StorageUnavailable, open_storage
from app.storage.objects import ObjectStorage

DATA = bytes(range(256)) * 1000


def test_an_object_comes_back_whole_and_in_ranges(storage: Storage, tmp_path: Path) -> None:
    storage.put_bytes("projects/p/one", DATA)

    head = storage.head("projects/p/one")
    assert head is not None
    assert head.size == len(DATA)
    assert storage.get_range("projects/p/one", 3, 7) == DATA[3:7]
    assert storage.get_range("projects/p/one", len(DATA) - 2, len(DATA) + 9) == DATA[-2:]
    assert storage.get_range("projects/p/one", 5, 5) == b""
    assert storage.get_range("projects/p/one", len(DATA), len(DATA) + 1) == b""
    assert b"".join(storage.stream("projects/p/one")) == DATA
    assert b"".join(storage.stream("projects/p/one", 100, 70_000, chunk=1000)) == DATA[100:70_000]
    storage.get_file("projects/p/one", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == DATA


def test_put_file_replaces_and_may_be_empty(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(DATA)
    storage.put_file("k/a", tmp_path / "source", "text/csv")
    assert b"".join(storage.stream("k/a")) == DATA

    (tmp_path / "source").write_bytes(b"")
    storage.put_file("k/a", tmp_path / "source")
    assert b"".join(storage.stream("k/a")) == b""
    assert storage.exists("k/a")


def test_a_missing_key_is_absent_everywhere(storage: Storage, tmp_path: Path) -> None:
    assert storage.head("no/such") is None
    assert not storage.exists("no/such")
    with pytest.raises(FileNotFoundError):
        storage.get_range("no/such", 0, 1)
    with pytest.raises(FileNotFoundError):
        list(storage.stream("no/such"))
    with pytest.raises(FileNotFoundError):
        storage.get_file("no/such", tmp_path / "copy")
    storage.delete("no/such")
    storage.delete_prefix("no/such")
    assert storage.names("no/such") == []


def test_the_names_below_a_prefix(storage: Storage) -> None:
    for key in ("n/files/a/source", "n/files/b/source", "n/files/b/deep/rows", "n/files/flat", "n/files2/c/source"):
        storage.put_bytes(key, b"x")
    assert sorted(storage.names("n/files")) == ["a", "b"]


def test_deleting_a_prefix_leaves_its_neighbours(storage: Storage) -> None:
    for key in ("p/job/1", "p/job/deep/2", "p/job2/3", "p/jobs"):
        storage.put_bytes(key, b"x")
    storage.delete_prefix("p/job")
    assert [storage.exists(key) for key in ("p/job/1", "p/job/deep/2", "p/job2/3", "p/jobs")] == [
        False,
        False,
        True,
        True,
    ]
    storage.delete("p/jobs")
    assert not storage.exists("p/jobs")


def test_a_prefix_is_deleted_but_for_what_is_kept(storage: Storage) -> None:
    for key in ("q/job/1/a", "q/job/2/checkpoints/3/a", "q/job/2/checkpoints/3/deep/b", "q/job/2/checkpoints/30/a"):
        storage.put_bytes(key, b"x")
    storage.delete_prefix("q/job", keep=["q/job/2/checkpoints/3"])
    assert not storage.exists("q/job/1/a")
    assert not storage.exists("q/job/2/checkpoints/30/a")
    assert storage.exists("q/job/2/checkpoints/3/a")
    assert storage.exists("q/job/2/checkpoints/3/deep/b")
    storage.delete_prefix("q/job", keep=["q/other"])
    assert not storage.exists("q/job/2/checkpoints/3/a")


def test_a_streamed_object_appears_at_the_end_of_its_block(storage: Storage) -> None:
    part = os.urandom(3 * 2**20)

    async def upload() -> None:
        async with storage.put_stream("s/one") as writer:
            for _ in range(4):
                await writer.write(part)
            await writer.write(b"end")
            assert not storage.exists("s/one")

    asyncio.run(upload())
    assert b"".join(storage.stream("s/one")) == part * 4 + b"end"


def test_an_interrupted_stream_leaves_nothing_behind(storage: Storage) -> None:
    async def upload() -> None:
        async with storage.put_stream("s/two") as writer:
            for _ in range(3):
                await writer.write(bytes(3 * 2**20))
            raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        asyncio.run(upload())
    assert not storage.exists("s/two")


def test_an_interrupted_write_keeps_the_object_before_it(storage: Storage) -> None:
    storage.put_bytes("s/three", b"before")

    async def upload() -> None:
        async with storage.put_stream("s/three") as writer:
            await writer.write(b"after")
            raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        asyncio.run(upload())
    assert b"".join(storage.stream("s/three")) == b"before"


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/x", "a//b", "", "a/", "./a", "a\\b", "a\0b"])
def test_a_key_cannot_leave_the_store(storage: Storage, key: str) -> None:
    with pytest.raises(ValueError, match="not a storage key"):
        storage.put_bytes(key, b"x")


def test_s3_keeps_the_prefix_and_content_type_and_aborts_cut_uploads(s3: tuple[str, object]) -> None:
    url, client = s3
    bucket = url.split("/")[2]
    storage = open_storage(url)
    storage.put_bytes("k", b"x", "text/csv")
    assert client.head_object(Bucket=bucket, Key="a/prefix/k")["ContentType"] == "text/csv"  # type: ignore[attr-defined]
    assert storage.local_path("k") is None

    async def cut() -> None:
        async with storage.put_stream("cut") as writer:
            for _ in range(4):
                await writer.write(bytes(4 * 2**20))
            raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        asyncio.run(cut())
    assert not client.list_multipart_uploads(Bucket=bucket).get("Uploads")  # type: ignore[attr-defined]


def test_a_failing_store_raises_instead_of_hanging(s3: tuple[str, object]) -> None:
    storage = open_storage("s3://no-such-bucket-here/x")

    async def upload() -> None:
        async with storage.put_stream("k") as writer:
            for _ in range(50):
                await writer.write(bytes(2**20))

    with pytest.raises(FileNotFoundError):
        asyncio.run(asyncio.wait_for(upload(), 60))


def test_a_store_that_is_gone_is_one_error_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    storage = ObjectStorage(from_url("s3://bucket", retry_config={"max_retries": 0}))
    (tmp_path / "file").write_bytes(b"x")

    async def upload() -> None:
        async with storage.put_stream("k") as writer:
            await writer.write(b"x")

    calls: list[Callable[[], object]] = [
        lambda: storage.put_bytes("k", b"x"),
        lambda: storage.put_file("k", tmp_path / "file"),
        lambda: asyncio.run(upload()),
        lambda: storage.get_range("k", 0, 1),
        lambda: storage.head("k"),
        lambda: storage.delete("k"),
        lambda: storage.delete_prefix("k"),
    ]
    for call in calls:
        with pytest.raises(StorageUnavailable) as caught:
            call()
        assert "127.0.0.1" not in str(caught.value)


def test_local_files_are_private_and_leave_no_temporary_names(tmp_path: Path) -> None:
    storage = open_storage((tmp_path / "root").as_uri())
    storage.put_bytes("a/b", b"x")
    path = storage.local_path("a/b")
    assert path is not None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [entry.name for entry in (tmp_path / "root" / ".incoming").iterdir()] == []


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="scheme"):
        open_storage("ftp://host/x")
