"""Uploads at their end: completed once, by whoever asks, or not at all and then again."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from openai.types import Upload
from sqlalchemy import select

from app.auth import service as auth
from app.db.session import Database
from app.settings import Settings
from app.uploads import routes, service
from app.uploads import tables as rows
from app.uploads.schemas import CompleteUpload
from tests.app.uploads.parts import DATA, MD5, refused, send, stored
from tests.running import until


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


OTHER_MD5 = hashlib.md5(DATA[9:] + DATA[:9]).hexdigest()


def test_asked_again_with_another_md5_it_is_not_the_same(
    openai_client: openai.OpenAI, begin: Callable[..., Upload]
) -> None:
    """Whoever asks so has other bytes in mind: it is told that they are not these."""
    upload = begin()
    parts = send(openai_client, upload, DATA[:9], DATA[9:])

    def complete(**fields: Any) -> Upload:
        return openai_client.uploads.complete(upload.id, part_ids=parts, **fields)

    first = complete()
    assert first.file is not None
    for same in ({}, {"md5": MD5}, {"md5": MD5.upper()}):
        again = complete(**same)
        assert again.file is not None
        assert again.file.id == first.file.id
    refused("md5_mismatch", openai.BadRequestError, lambda: complete(md5=OTHER_MD5))


def test_parts_that_were_joined_in_vain_are_not_read_again(
    openai_client: openai.OpenAI, begin: Callable[..., Upload], app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = begin()
    first, last = send(openai_client, upload, DATA[:9], DATA[9:])
    stream, read = type(app.state.storage).stream, []

    def look(storage: Any, key: str, *arguments: Any) -> Any:
        read.append(key)
        return stream(storage, key, *arguments)

    monkeypatch.setattr(type(app.state.storage), "stream", look)

    def complete(*parts: str, md5: str) -> Callable[[], Upload]:
        return lambda: openai_client.uploads.complete(upload.id, part_ids=list(parts), md5=md5)

    for _ in range(3):
        refused("md5_mismatch", openai.BadRequestError, complete(last, first, md5=MD5))
    assert len(read) == 2
    assert complete(last, first, md5=OTHER_MD5)().status == "completed"  # it is what these parts come to
    assert len(read) == 4


@pytest.mark.parametrize("public", [False, True])
def test_an_upload_is_not_joined_for_ever(
    openai_client: openai.OpenAI,
    begin: Callable[..., Upload],
    app: FastAPI,
    settings: Settings,
    public: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each try reads and writes all of it, up to gigabytes, whatever it is refused for."""
    monkeypatch.setattr(service, "MAX_REFUSALS", 2)
    if public:  # bytes that were protected before: known only once they are joined
        openai_client.files.create(file=("a.csv", DATA), purpose="fine-tune")
    upload = begin(public=public)
    first, last = send(openai_client, upload, DATA[:9], DATA[9:])
    code, kind = ("was_private", openai.ConflictError) if public else ("md5_mismatch", openai.BadRequestError)
    for order in ([first, last], [last, first])[:: 1 if public else -1]:
        given: Any = {} if public else {"md5": OTHER_MD5 if order == [first, last] else MD5}
        call = partial(openai_client.uploads.complete, upload.id, part_ids=[first, last] if public else order, **given)
        refused(code, kind, call)
    end = partial(openai_client.uploads.complete, upload.id, part_ids=[first, last])
    refused("upload_refused_too_often", openai.ConflictError, end)
    assert openai_client.uploads.cancel(upload.id).status == "cancelled"
    assert stored(settings, "uploads") == []


@pytest.mark.every_database
def test_tries_that_come_at_once_are_counted_too(
    openai_client: openai.OpenAI, begin: Callable[..., Upload], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten of them wait, in the middle of their bytes, for all others to have been answered."""
    client, upload = openai_client.with_options(max_retries=0), begin()
    parts, join, joined, go_on = send(client, upload, DATA[:9], DATA[9:]), routes.join, [], threading.Event()

    async def slow(*arguments: Any) -> Any:
        joined.append(arguments)
        while not go_on.is_set():
            await asyncio.sleep(0.01)
        return await join(*arguments)

    monkeypatch.setattr(routes, "join", slow)
    answers: list[str | None] = []

    def complete() -> None:
        try:
            client.uploads.complete(upload.id, part_ids=parts, md5=OTHER_MD5)
        except openai.APIStatusError as error:
            answers.append(error.code)

    threads = [threading.Thread(target=complete) for _ in range(service.MAX_REFUSALS + 6)]
    for thread in threads:
        thread.start()
    until(lambda: len(joined) + len(answers) == len(threads))
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(joined) == service.MAX_REFUSALS
    assert sorted(map(str, answers)) == ["md5_mismatch"] * 10 + ["upload_refused_too_often"] * 6


@pytest.mark.every_database
def test_a_try_that_was_not_refused_does_not_count(
    openai_client: openai.OpenAI, begin: Callable[..., Upload], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that fails, or bytes that nobody waits for any more, are not the upload's fault."""
    client, upload = openai_client.with_options(max_retries=0), begin()
    parts, join = send(client, upload, DATA[:9], DATA[9:]), routes.join

    async def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(routes, "join", full)
    for _ in range(service.MAX_REFUSALS + 1):
        refused(
            "storage_unavailable",
            openai.InternalServerError,
            lambda: client.uploads.complete(upload.id, part_ids=parts),
        )
    monkeypatch.setattr(routes, "join", join)
    assert client.uploads.complete(upload.id, part_ids=parts).status == "completed"


def test_nothing_stays_of_the_parts_of_an_upload_that_has_ended(
    openai_client: openai.OpenAI, begin: Callable[..., Upload], database: Database
) -> None:
    done, cancelled, pending = begin(), begin(), begin()
    parts = send(openai_client, done, DATA[:9], DATA[9:], b"superfluous")
    for upload in (cancelled, pending):
        send(openai_client, upload, DATA)
    openai_client.uploads.cancel(cancelled.id)
    first = openai_client.uploads.complete(done.id, part_ids=parts[:2])
    with database.reading() as session:
        assert [part.upload_id for part in session.scalars(select(rows.Part))] == [pending.id]
    again = openai_client.uploads.complete(done.id, part_ids=parts[:2])
    assert first.file is not None
    assert again.file is not None
    assert again.file.id == first.file.id
    refused(
        "upload_completed", openai.ConflictError, lambda: openai_client.uploads.complete(done.id, part_ids=parts[:1])
    )
