"""A job's events live, over real sockets that break at any byte, while several writers tell more."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import openai
import pytest
from fastapi.testclient import TestClient
from openai import Stream
from openai.types.fine_tuning import FineTuningJobEvent

from app.db.session import Database
from app.events import stream
from app.events.service import record
from tests.app.jobs.conftest import MODEL
from tests.conftest import LiveServer

JOBS = "/v1/fine_tuning/jobs"
WRITERS, EACH = 3, 40


@pytest.fixture
def job_id(client: TestClient, make_file: Callable[..., str]) -> str:
    """A job that waits: nobody takes it."""
    return client.post(JOBS, json={"model": MODEL, "training_file": make_file()}).json()["id"]


def _received(url: str, key: str, job_id: str, last: str | None, most: int) -> bytes:
    """The body's first `most` bytes at most, read from a socket that is then reset in the middle of whatever it was."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    headers = {"authorization": f"Bearer {key}", "accept": "text/event-stream"}
    connection.request("GET", f"{JOBS}/{job_id}/events", headers=headers | ({"last-event-id": last} if last else {}))
    with contextlib.closing(connection):
        assert connection.sock is not None
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        answer = connection.getresponse()
        assert answer.status == 200
        body = b""
        while len(body) < most and (more := answer.read1(most - len(body))):
            body += more
    return body


def _dispatched(body: bytes, last: str | None) -> tuple[list[str], str | None]:
    """Data and the last event's id, by the letter of the standard (WHATWG HTML, 9.2.6): what no blank line ended is
    as if it had not been."""
    found, data, buffered = [], [], last
    for line in body.decode().split("\n")[:-1]:
        if line.startswith("data: "):
            data.append(line[6:])
        elif line.startswith("id: "):
            buffered = line[4:]
        elif not line:
            last = buffered
            found += ["\n".join(data)] if data else []
            data = []
    return found, last


def _by_line(body: bytes, last: str | None) -> tuple[list[str], str | None]:
    """The same by a shell script's loop, that takes each line for what it is as soon as it is there."""
    found = []
    for line in body.decode().split("\n")[:-1]:
        found += [line[6:]] if line.startswith("data: ") else []
        last = line[4:] if line.startswith("id: ") else last
    return found, last


def _until_done(
    read: Callable[[str | None, int], bytes], parse: Callable[..., tuple[list[str], str | None]], sizes: Iterator[int]
) -> list[str]:
    """The ids of the events that a client has who connects again and again, with the last id that it saw."""
    ids: list[str] = []
    last: str | None = None
    while True:
        found, last = parse(read(last, next(sizes)), last)
        ids += [json.loads(data)["id"] for data in found if data != "[DONE]"]
        if "[DONE]" in found:
            return ids


@pytest.mark.every_database
def test_no_event_is_lost_where_connections_break_and_several_write(
    client: TestClient,
    live_server: LiveServer,
    api_key: str,
    project_id: str,
    database_url: str,
    job_id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream, "POLL_SECONDS", 0.01)
    results: dict[str, list[str]] = {}
    errors: list[BaseException] = []

    def write(number: int) -> None:
        opened = Database(database_url)  # as another process has it
        try:
            for step in range(EACH):
                with opened.writing() as session:
                    text = f"Step {step} of {number}."
                    record(session, project_id=project_id, job_id=job_id, code="step", message=text, data={"s": step})
                    time.sleep(0.002 * (step % 3))  # between the number and its commit
                time.sleep(0.002)
        except BaseException as error:
            errors.append(error)
        finally:
            opened.dispose()

    def follow(name: str, parse: Callable[..., tuple[list[str], str | None]], seed: int) -> None:
        chance = np.random.default_rng(seed)
        sizes = iter(lambda: int(chance.integers(1, 1500)), None)
        try:
            results[name] = _until_done(
                lambda last, most: _received(live_server.url, api_key, job_id, last, most), parse, sizes
            )
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(WRITERS)]
    clients = {"standard": _dispatched, "by line": _by_line}
    readers = [
        threading.Thread(target=follow, args=(f"{name} {seed}", parse, seed))
        for name, parse in clients.items()
        for seed in range(2)
    ]
    for thread in [*readers, *writers]:
        thread.start()
    for thread in writers:
        thread.join(60)
    client.post(f"{JOBS}/{job_id}/cancel")
    for thread in readers:
        thread.join(60)
    assert errors == []

    told: list[str] = []
    while True:  # the same, page by page
        query: dict[str, Any] = {"order": "asc", "limit": 7, **({"after": told[-1]} if told else {})}
        page = client.get(f"{JOBS}/{job_id}/events", params=query).json()
        told += [event["id"] for event in page["data"]]
        if not page["has_more"]:
            break
    assert len(told) == len(set(told)) >= WRITERS * EACH
    for name, ids in sorted(results.items()):
        if name.startswith("standard"):
            assert ids == told, name  # each once
        else:
            assert sorted(set(ids)) == sorted(told), name
    assert len(results) == 4


def test_a_stream_that_is_cut_at_any_byte_goes_on_where_it_was(
    client: TestClient, live_server: LiveServer, api_key: str, job_id: str
) -> None:
    client.post(f"{JOBS}/{job_id}/cancel")
    whole = _received(live_server.url, api_key, job_id, None, 1 << 20)
    expected, _ = _dispatched(whole, None)
    assert len(expected) >= 3
    rest = {last: _received(live_server.url, api_key, job_id, last, 1 << 20) for last in _ids(whole)}
    for parse in (_dispatched, _by_line):
        for cut in range(len(whole) + 1):
            found, last = parse(whole[:cut], None)
            again, _ = parse(rest[last], last)
            if parse is _dispatched:
                assert found + again == expected or found == expected, cut
            else:
                assert set(found) | set(again) == set(expected), cut


def _ids(whole: bytes) -> list[str | None]:
    return [None, *(line[4:] for line in whole.decode().split("\n") if line.startswith("id: "))]


def test_the_unmodified_client_reads_through_a_long_silence(
    client: TestClient,
    live_server: LiveServer,
    openai_client: openai.OpenAI,
    job_id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(stream, "PING_SECONDS", 0.02)
    canceller = threading.Timer(0.5, lambda: client.post(f"{JOBS}/{job_id}/cancel"))
    canceller.start()
    with openai_client.get(
        f"/fine_tuning/jobs/{job_id}/events",
        cast_to=object,
        stream=True,
        stream_cls=Stream[FineTuningJobEvent],
        options={"headers": {"Accept": "text/event-stream"}},
    ) as events:
        codes = [event.model_extra["code"] for event in events if event.model_extra]
    canceller.join()
    assert codes[-1] == "job_cancelled"
    assert len(codes) >= 3
