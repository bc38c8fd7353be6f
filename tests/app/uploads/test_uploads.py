"""/v1/uploads with the unmodified client: a file in parts is the file that one request would have made."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from openai.types import Upload
from sqlalchemy import update

from app.auth import service as auth
from app.db.session import Database
from app.files import service as files
from app.ids import new_id
from app.settings import Settings
from app.storage import open_storage
from app.uploads import repository, service
from app.uploads import tables as rows
from tests.app.uploads.parts import DATA, MD5, refused, send, stored


def test_parts_in_any_order_become_one_file(
    openai_client: openai.OpenAI, begin: Callable[..., Upload], settings: Settings, app: FastAPI, database: Database
) -> None:
    upload = begin(privacy_unit="patient", expires_after={"anchor": "created_at", "seconds": 7200})
    assert (upload.object, upload.status, upload.bytes, upload.file) == ("upload", "pending", len(DATA), None)
    assert upload.filename == "patients.csv"
    assert upload.expires_at - upload.created_at == settings.upload_seconds
    last, first, twice = send(openai_client, upload, DATA[500:], DATA[:500], DATA[500:])
    done = openai_client.uploads.complete(upload.id, part_ids=[first, last], md5=MD5.upper())
    assert done.status == "completed"
    assert done.file is not None
    file = openai_client.files.retrieve(done.file.id)
    assert (file.bytes, file.filename, file.purpose) == (len(DATA), "patients.csv", "fine-tune")
    assert file.expires_at - file.created_at == 7200
    assert file.privacy_unit == {"column": "patient"}  # type: ignore[attr-defined]
    assert openai_client.files.content(file.id).read() == DATA
    (source,) = stored(settings, "files")
    assert source.read_bytes() == DATA
    assert stored(settings, "uploads") == [], "parts are gone, the superfluous one too"
    assert twice
    assert files.process(database, app.state.storage, settings, file.id)
    read = openai_client.files.retrieve(file.id)
    assert (read.status, read.num_units, read.num_rows) == ("processed", 7, None)  # type: ignore[attr-defined]


def test_the_clients_own_helper_sends_a_file_in_parts(openai_client: openai.OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "patients.csv"
    path.write_bytes(DATA)
    done = openai_client.uploads.upload_file_chunked(
        file=path, mime_type="text/csv", purpose="fine-tune", part_size=100, md5=MD5
    )
    assert done.status == "completed"
    assert done.file is not None
    assert openai_client.files.content(done.file.id).read() == DATA
    assert openai_client.files.content(done.file.id).response.headers["etag"] == (
        f'"{hashlib.sha256(DATA).hexdigest()}"'
    )


def test_parts_in_a_bucket(
    openai_client: openai.OpenAI, begin: Callable[..., Upload], s3: tuple[str, Any], app: FastAPI, database: Database
) -> None:
    url, bucket = s3
    app.state.storage = storage = open_storage(url)
    upload, left = begin(), begin()
    parts = send(openai_client, upload, DATA[:100], DATA[100:])
    send(openai_client, left, DATA)
    done = openai_client.uploads.complete(upload.id, part_ids=parts, md5=MD5)
    assert done.file is not None
    assert openai_client.files.content(done.file.id).read() == DATA
    _set(database, expires_at=1.0)
    service.sweep(database, storage)
    service.sweep_orphans(database, storage)
    keys = [entry["Key"] for entry in bucket.list_objects_v2(Bucket=url.split("/")[2])["Contents"]]
    assert [key for key in keys if "/budgets/" not in key] == [
        f"a/prefix/{files.prefix(_project(database), done.file.id)}/source"
    ]


def test_a_cancelled_upload_takes_nothing_more(
    openai_client: openai.OpenAI, begin: Callable[..., Upload], settings: Settings
) -> None:
    upload = begin()
    parts = send(openai_client, upload, DATA)
    assert len(stored(settings, "uploads")) == 1
    assert openai_client.uploads.cancel(upload.id).status == "cancelled"
    assert openai_client.uploads.cancel(upload.id).status == "cancelled"
    assert stored(settings, "uploads") == []
    refused("upload_cancelled", openai.ConflictError, lambda: send(openai_client, upload, DATA))
    refused("upload_cancelled", openai.ConflictError, lambda: openai_client.uploads.complete(upload.id, part_ids=parts))


def test_limits(openai_client: openai.OpenAI, begin: Callable[..., Upload], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MAX_PARTS", 3)
    limit = refused("file_too_large", openai.APIStatusError, lambda: begin(2**40))
    assert limit.status_code == 413
    upload = begin(10)
    refused("part_too_large", openai.APIStatusError, lambda: send(openai_client, upload, b"x" * 70_000))
    send(openai_client, upload, b"x" * 10, b"x" * 9)
    refused("too_many_bytes", openai.BadRequestError, lambda: send(openai_client, upload, b"xx"))
    send(openai_client, upload, b"x")
    refused("too_many_parts", openai.BadRequestError, lambda: send(openai_client, upload, b""))


def test_parts_are_listed_for_a_client_that_goes_on(openai_client: openai.OpenAI, begin: Callable[..., Upload]) -> None:
    upload = begin()
    ids = send(openai_client, upload, DATA[:9], DATA[9:20])
    listed: Any = openai_client.get(f"/uploads/{upload.id}/parts?order=asc", cast_to=object)
    assert [(part["id"], part["bytes"]) for part in listed["data"]] == [(ids[0], 9), (ids[1], 11)]
    assert openai_client.get(f"/uploads/{upload.id}", cast_to=Upload).status == "pending"


def test_what_a_file_would_be_refused_for_is_said_before_the_bytes(
    openai_client: openai.OpenAI, begin: Callable[..., Upload], make_key: Callable[..., str]
) -> None:
    def as_of(scope: str) -> openai.OpenAI:
        return openai_client.with_options(api_key=make_key(scope))

    def create(client: openai.OpenAI, **fields: Any) -> Callable[[], object]:
        given = {"bytes": 9, "filename": "a.csv", "mime_type": "text/csv", "purpose": "fine-tune"}
        return lambda: client.post("/uploads", body={**given, **fields}, cast_to=object)

    refused("purpose_not_supported", openai.BadRequestError, create(openai_client, purpose="vision"))
    refused("privacy_budget_not_found", openai.NotFoundError, create(openai_client, privacy_budget="pb-none"))
    refused("invalid_request", openai.BadRequestError, create(openai_client, privacy_unti="patient"))
    refused("invalid_request", openai.BadRequestError, create(openai_client, privacy_unit="a\nb"))
    refused("invalid_request", openai.BadRequestError, create(openai_client, public=True, privacy_unit="patient"))
    refused("insufficient_scope", openai.PermissionDeniedError, create(as_of("submit"), public=True))
    refused("insufficient_scope", openai.PermissionDeniedError, create(as_of("read")))
    # An admin's declaration is not made by whoever completes it.
    upload = begin(public=True)
    parts = send(openai_client, upload, DATA)
    refused(
        "insufficient_scope",
        openai.PermissionDeniedError,
        lambda: as_of("submit").uploads.complete(upload.id, part_ids=parts),
    )
    done = openai_client.uploads.complete(upload.id, part_ids=parts)
    assert done.file is not None
    assert done.file.public is True  # type: ignore[attr-defined]


def _project(database: Database) -> str:
    with database.reading() as session:
        return auth.project_ids(session)[0]


def _set(database: Database, **values: Any) -> None:
    with database.writing() as session:
        session.execute(update(rows.Upload).values(**values))


def test_an_upload_expires_and_the_sweep_removes_its_parts(
    openai_client: openai.OpenAI, begin: Callable[..., Upload], settings: Settings, app: FastAPI, database: Database
) -> None:
    upload = begin()
    parts = send(openai_client, upload, DATA)
    service.sweep(database, app.state.storage)
    assert len(stored(settings, "uploads")) == 1
    _set(database, expires_at=1.0)
    refused("upload_expired", openai.ConflictError, lambda: send(openai_client, upload, DATA))
    refused("upload_expired", openai.ConflictError, lambda: openai_client.uploads.complete(upload.id, part_ids=parts))
    service.sweep(database, app.state.storage)
    assert stored(settings, "uploads") == []
    assert openai_client.get(f"/uploads/{upload.id}", cast_to=Upload).status == "expired"
    with database.reading() as session:
        assert repository.to_erase(session, 10) == []


def test_parts_that_nothing_waits_for_are_removed_and_those_of_a_pending_upload_stay(
    openai_client: openai.OpenAI, begin: Callable[..., Upload], settings: Settings, app: FastAPI, database: Database
) -> None:
    ended, pending = begin(), begin()
    send(openai_client, pending, DATA)
    openai_client.uploads.cancel(ended.id)
    with database.reading() as session:
        row = session.get_one(rows.Upload, ended.id)
    app.state.storage.put_bytes(service.part_key(row, new_id("part")), b"stored by a process that then died")
    assert service.sweep_orphans(database, app.state.storage) == 1
    (left,) = stored(settings, "uploads")
    assert pending.id in left.parts


def test_a_project_has_so_many_uploads_at_once(
    openai_client: openai.OpenAI,
    begin: Callable[..., Upload],
    settings: Settings,
    database: Database,
    make_key: Callable[..., str],
) -> None:
    settings.max_pending_uploads = 2
    first, _ = begin(), begin()
    full = refused("too_many_uploads", openai.ConflictError, begin)
    assert full.response.headers["x-should-retry"] == "false"
    other = openai_client.with_options(api_key=make_key("submit", project="other"))
    assert other.uploads.create(bytes=1, filename="a.csv", mime_type="text/csv", purpose="fine-tune")
    openai_client.uploads.cancel(first.id)
    third = begin()
    refused("too_many_uploads", openai.ConflictError, begin)
    openai_client.uploads.complete(third.id, part_ids=send(openai_client, third, DATA))
    begin()
    refused("too_many_uploads", openai.ConflictError, begin)
    _set(database, expires_at=1.0)
    begin()


def test_what_is_begun_can_be_found_again(openai_client: openai.OpenAI, begin: Callable[..., Upload]) -> None:
    """A client that was cut off before it knew an id would fill its project up."""
    ids = [begin().id for _ in range(3)]
    openai_client.uploads.cancel(ids[1])
    listed: Any = openai_client.get("/uploads?limit=2", cast_to=object)
    assert [(each["id"], each["status"]) for each in listed["data"]] == [(ids[2], "pending"), (ids[1], "cancelled")]
    assert listed["has_more"] is True
    listed = openai_client.get(f"/uploads?after={ids[1]}", cast_to=object)
    assert ([each["id"] for each in listed["data"]], listed["has_more"]) == ([ids[0]], False)


@pytest.mark.every_database
def test_one_idempotency_key_begins_one_upload(
    openai_client: openai.OpenAI, begin: Callable[..., Upload], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = repository.find_by_idempotency_key

    def slow(*arguments: Any) -> rows.Upload | None:
        found = find(*arguments)
        time.sleep(0.05)  # for the others to look, too, were they let in
        return found

    monkeypatch.setattr(repository, "find_by_idempotency_key", slow)

    once = openai_client.with_options(max_retries=0)

    def create(size: int = len(DATA), key: str = "once") -> Upload:
        return once.uploads.create(
            bytes=size,
            filename="a.csv",
            mime_type="text/csv",
            purpose="fine-tune",
            extra_headers={"Idempotency-Key": key},
            extra_body={"privacy_unit": "patient"},
        )

    begun: list[Upload] = []
    threads = [threading.Thread(target=lambda: begun.append(create())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(begun) == 6
    assert len({upload.id for upload in begun}) == 1
    refused("idempotency_mismatch", openai.ConflictError, lambda: create(7))
    assert create(7, key="other").id != begun[0].id
    done = openai_client.uploads.complete(begun[0].id, part_ids=send(openai_client, begun[0], DATA))
    again = create()
    assert (again.status, again.file and again.file.id) == ("completed", done.file and done.file.id)
    left = create(key="left")
    openai_client.uploads.cancel(left.id)
    refused("upload_cancelled", openai.ConflictError, lambda: create(key="left"))
