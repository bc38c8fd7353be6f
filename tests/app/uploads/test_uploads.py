"""/v1/uploads with the unmodified client: a file in parts is the file that one request would have made."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable
from functools import partial
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
from app.uploads import repository, routes, service
from app.uploads import tables as rows
from app.uploads.schemas import CompleteUpload

DATA = b"text,label,patient\n" + b"".join(b"words %d,%d,p%d\n" % (n, n % 2, n % 7) for n in range(60))
MD5 = hashlib.md5(DATA).hexdigest()


@pytest.fixture
def begin(openai_client: openai.OpenAI) -> Callable[..., Upload]:
    """Begins an upload of DATA, or of so many bytes."""

    def create(size: int = len(DATA), **extra: Any) -> Upload:
        return openai_client.uploads.create(
            bytes=size, filename="patients.csv", mime_type="text/csv", purpose="fine-tune", extra_body=extra
        )

    return create


def stored(settings: Settings, kind: str) -> list[Path]:
    return [path for path in (settings.data_dir / "storage").rglob("*") if path.is_file() and kind in path.parts]


def send(client: openai.OpenAI, upload: Upload, *pieces: bytes) -> list[str]:
    return [client.uploads.parts.create(upload.id, data=piece).id for piece in pieces]


def refused(code: str, kind: type[openai.APIStatusError], call: Callable[[], object]) -> Any:
    with pytest.raises(kind) as caught:
        call()
    assert caught.value.code == code
    return caught.value


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


def test_asked_again_a_completed_upload_answers_the_same_file(
    openai_client: openai.OpenAI, begin: Callable[..., Upload], settings: Settings
) -> None:
    """The client sends a request again whose answer it did not get."""
    upload = begin()
    parts = send(openai_client, upload, DATA[:9], DATA[9:])
    answers: list[Upload] = []
    threads = [
        threading.Thread(target=lambda: answers.append(openai_client.uploads.complete(upload.id, part_ids=parts)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({answer.file.id for answer in answers if answer.file}) == 1
    assert len(answers) == 4
    assert len(stored(settings, "files")) == 1
    assert len(openai_client.files.list().data) == 1
    refused(
        "upload_completed",
        openai.ConflictError,
        lambda: openai_client.uploads.complete(upload.id, part_ids=parts[::-1]),
    )
    refused("upload_completed", openai.ConflictError, lambda: openai_client.uploads.cancel(upload.id))
    refused("upload_completed", openai.ConflictError, lambda: send(openai_client, upload, b"x"))


def test_what_does_not_add_up_completes_nothing_and_loses_nothing(
    openai_client: openai.OpenAI, begin: Callable[..., Upload], settings: Settings
) -> None:
    upload = begin()
    other = send(openai_client, begin(), DATA)
    first, last = send(openai_client, upload, DATA[:9], DATA[9:])

    def complete(*parts: str, **fields: Any) -> Callable[[], object]:
        return lambda: openai_client.uploads.complete(upload.id, part_ids=list(parts), **fields)

    error = refused("upload_size_mismatch", openai.BadRequestError, complete(first))
    assert error.param == "part_ids"
    refused("duplicate_part", openai.BadRequestError, complete(first, first))
    refused("upload_part_not_found", openai.NotFoundError, complete(first, other[0]))
    refused("md5_mismatch", openai.BadRequestError, complete(last, first, md5=MD5))
    refused("invalid_request", openai.BadRequestError, complete(first, last, md5="none"))
    refused("invalid_request", openai.BadRequestError, complete())
    assert stored(settings, "files") == []
    assert openai_client.files.list().data == []
    assert openai_client.uploads.complete(upload.id, part_ids=[first, last], md5=MD5).status == "completed"


def test_a_file_that_is_refused_at_its_end_leaves_the_upload(
    openai_client: openai.OpenAI, begin: Callable[..., Upload], settings: Settings
) -> None:
    """Bytes that were protected before cannot become public, however they come."""
    openai_client.files.create(file=("a.csv", DATA), purpose="fine-tune")
    upload = begin(public=True)
    parts = send(openai_client, upload, DATA)
    refused("was_private", openai.ConflictError, lambda: openai_client.uploads.complete(upload.id, part_ids=parts))
    assert len(stored(settings, "files")) == 1
    assert openai_client.uploads.cancel(upload.id).status == "cancelled"


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


@pytest.mark.every_database
def test_of_a_cancel_and_a_complete_one_wins(
    openai_client: openai.OpenAI, begin: Callable[..., Upload], settings: Settings
) -> None:
    for _ in range(5):
        upload = begin()
        parts = send(openai_client, upload, DATA[:9], DATA[9:])
        outcome: dict[str, str] = {}

        def end(verb: str, call: Callable[[], Upload], outcome: dict[str, str] = outcome) -> None:
            try:
                outcome[verb] = call().status
            except openai.APIStatusError as error:
                outcome[verb] = str(error.code)

        calls = {
            "complete": partial(openai_client.uploads.complete, upload.id, part_ids=parts),
            "cancel": partial(openai_client.uploads.cancel, upload.id),
        }
        threads = [threading.Thread(target=end, args=call) for call in calls.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outcome in (
            {"complete": "completed", "cancel": "upload_completed"},
            {"complete": "upload_cancelled", "cancel": "cancelled"},
        )
        assert len(stored(settings, "files")) == len(openai_client.files.list().data)


def test_an_answer_that_is_cut_off_after_the_commit_leaves_the_file_its_bytes(
    openai_client: openai.OpenAI,
    begin: Callable[..., Upload],
    settings: Settings,
    app: FastAPI,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that stops cancels what it has not answered after some seconds; the thread goes on."""
    upload = begin()
    parts = send(openai_client, upload, DATA)
    token = openai_client.api_key
    with database.reading() as session:
        caller = auth.authenticate(session, token)
    committed, cancelled = threading.Event(), threading.Event()
    erase = service.erase

    def slow(*inputs: Any) -> None:
        committed.set()
        cancelled.wait(10)
        erase(*inputs)

    monkeypatch.setattr(service, "erase", slow)

    async def cut_off() -> None:
        body = CompleteUpload(part_ids=parts)
        answer = asyncio.create_task(
            routes.complete_upload(body, caller, database, app.state.storage, app.state.queue, upload.id)
        )
        await asyncio.to_thread(committed.wait, 10)
        answer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answer
        cancelled.set()

    asyncio.run(cut_off())
    assert openai_client.get(f"/uploads/{upload.id}", cast_to=Upload).status == "completed"
    (source,) = stored(settings, "files")
    assert source.read_bytes() == DATA
