"""How far the reader is: seen while it reads, in every format, as places in the file and never as rows."""

from __future__ import annotations

import gzip
import io
import json
import secrets
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from app.db.session import Database
from app.files import processing, reader, service
from app.files.progress import progress, told
from app.files.reader import read
from app.settings import Settings
from tests.app.files.conftest import Upload
from tests.running import until

_ROWS = 20_000
_TABLE = pa.table({"text": [f"words of row {n}, and some more" for n in range(_ROWS)], "label": ["a", "b"] * 10_000})


def _delimited(separator: str) -> bytes:
    rows = zip(("text", *_TABLE["text"].to_pylist()), ("label", *_TABLE["label"].to_pylist()), strict=True)
    return "".join(f'"{text}"{separator}{label}\n' for text, label in rows).encode()


def _json(separator: str) -> bytes:
    return separator.join(map(json.dumps, _TABLE.to_pylist())).encode()


def _written(write: Callable[[io.BytesIO], None]) -> bytes:
    out = io.BytesIO()
    write(out)
    return out.getvalue()


def _arrow(kind: Any) -> bytes:
    def write(out: io.BytesIO) -> None:
        with kind(out, _TABLE.schema) as writer:
            writer.write_table(_TABLE, max_chunksize=1000)

    return _written(write)


def _images() -> bytes:
    def write(out: io.BytesIO) -> None:
        with zipfile.ZipFile(out, "w") as archive:
            for n in range(40):
                image = _written(lambda to, n=n: Image.new("RGB", (8, 8), (n, 0, 0)).save(to, "PNG"))
                archive.writestr(f"{'ab'[n % 2]}/{n}.png", image)

    return _written(write)


FORMATS: dict[str, Callable[[], bytes]] = {
    "a.csv": lambda: _delimited(","),
    "a.csv.gz": lambda: gzip.compress(_delimited(",")),
    "a.csv.zst": lambda: pa.compress(_delimited(","), "zstd", asbytes=True),
    "a.tsv": lambda: _delimited("\t"),
    "a.jsonl": lambda: _json("\n"),
    "a.json": lambda: b"[" + _json(",") + b"]",
    "a.conll": lambda: b"word O\nother B-PER\n\n" * _ROWS,
    "a.parquet": lambda: _written(lambda out: pq.write_table(_TABLE, out)),
    "a.arrow": lambda: _arrow(pa.ipc.new_file),
    "a.arrows": lambda: _arrow(pa.ipc.new_stream),
    "a.zip": _images,
}


@pytest.fixture
def followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """What the process in which the test runs has told, each time anew."""
    seen: list[int] = []
    write = processing.os.pwrite

    def noted(descriptor: int, data: bytes, offset: int) -> int:
        seen.append(int.from_bytes(data, "little"))
        return write(descriptor, data, offset)

    monkeypatch.setattr("app.files.progress.os.pwrite", noted)
    yield seen
    monkeypatch.setattr(progress, "_told_in", -1)


@pytest.mark.parametrize("filename", FORMATS)
def test_every_format_tells_how_far_it_is(tmp_path: Path, followed: list[int], filename: str) -> None:
    data = FORMATS[filename]()
    (tmp_path / "source").write_bytes(data)
    progress.start(tmp_path / "progress", len(data))
    read(tmp_path / "source", filename, tmp_path / "rows.parquet")
    assert followed == sorted(set(followed))
    assert followed[-1] == told(tmp_path / "progress") == len(data)
    assert len([place for place in followed if 0 < place < len(data)]) >= 3, "and on the way, too"


@pytest.mark.parametrize("filename", ["a.csv.gz", "a.csv.zst"])
def test_unpacking_is_told_too(
    tmp_path: Path, followed: list[int], filename: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes first, and of a large file it takes a while; what it tells grows on as the file is read."""
    lines = ["text,label", *(f"{secrets.token_hex(40)},{n % 2}" for n in range(_ROWS))]  # does not pack well
    texts = "\n".join(lines).encode()
    data = gzip.compress(texts) if filename.endswith(".gz") else pa.compress(texts, "zstd", asbytes=True)
    (tmp_path / "source").write_bytes(data)
    progress.start(tmp_path / "progress", len(data))
    read_after = []
    choose = reader.choose
    monkeypatch.setattr(reader, "choose", lambda *given: read_after.append(len(followed)) or choose(*given))
    reader.read(tmp_path / "source", filename, tmp_path / "rows.parquet")
    (unpacked,) = read_after
    assert unpacked >= 3
    assert len(followed) - unpacked >= 3
    assert followed == sorted(set(followed))
    assert followed[-1] == len(data)


def test_a_user_sees_it_and_nothing_of_rows(
    upload: Upload, client: TestClient, database: Database, app: FastAPI, settings: Settings, api_key: str
) -> None:
    line = b"some words of a text that are read again and again,%d\n"
    data = b"text,label\n" + b"".join(line % (n % 2) for n in range(600_000))
    file = upload(data)
    assert (file["bytes_read"], file["bytes"]) == (0, len(data))
    quick = settings.model_copy(update={"heartbeat_seconds": 0.02})
    worker = threading.Thread(target=service.process, args=(database, app.state.storage, quick, file["id"]))
    worker.start()
    seen: list[dict[str, Any]] = []

    def look() -> bool:
        seen.append(client.get(f"/v1/files/{file['id']}").json())
        return not worker.is_alive()

    until(look, 60)
    worker.join()
    places = [shown["bytes_read"] for shown in seen]
    assert places == sorted(places)
    assert len({place for place in places if 0 < place < len(data)}) >= 2
    reading = [shown for shown in seen if shown["status"] == "uploaded"]
    assert {(shown["num_rows"], shown["num_units"], shown["columns"]) for shown in reading} == {(None, None, None)}
    done = client.get(f"/v1/files/{file['id']}").json()
    assert (done["status"], done["bytes_read"], done["num_rows"]) == ("processed", len(data), 600_000)


def test_only_who_has_the_claim_tells(upload: Upload, database: Database, client: TestClient) -> None:
    file = upload(b"text,label\na,b\n")
    for _ in range(2):
        with database.writing() as session:
            assert processing.repository.claim(session, file["id"], -1.0) is not None
    with database.writing() as session:
        assert processing.repository.renew(session, file["id"], 2, -1.0, 7)
        assert not processing.repository.renew(session, file["id"], 1, -1.0, 9)
    assert client.get(f"/v1/files/{file['id']}").json()["bytes_read"] == 7
    with database.writing() as session:  # the next attempt begins again
        processing.repository.claim(session, file["id"], 60.0)
    assert client.get(f"/v1/files/{file['id']}").json()["bytes_read"] == 0
