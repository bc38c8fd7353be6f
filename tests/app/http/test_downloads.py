"""Ranges and conditions, as RFC 9110 (13, 14) has them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
from fastapi import FastAPI, Request, Response
from fastapi.testclient import TestClient

from app.http import problems
from app.http.downloads import Download, respond

BODY = bytes(range(100))
SHA = hashlib.sha256(BODY).hexdigest()
ETAG = f'"{SHA}"'


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    problems.install(app)

    def read(start: int, end: int) -> Iterator[bytes]:
        for place in range(start, end, 7):
            yield BODY[place : min(place + 7, end)]

    @app.api_route("/body", methods=["GET", "HEAD"])
    def body(request: Request) -> Response:
        return respond(request, Download("a b.bin", "application/octet-stream", len(BODY), SHA, read))

    @app.get("/empty")
    def empty(request: Request) -> Response:
        digest = hashlib.sha256(b"").hexdigest()
        return respond(request, Download("empty", "text/plain", 0, digest, lambda start, end: iter(())))

    return TestClient(app)


def test_the_whole_body(client: TestClient) -> None:
    answer = client.get("/body")
    assert (answer.status_code, answer.content) == (200, BODY)
    assert answer.headers["etag"] == ETAG
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["content-length"] == "100"
    assert answer.headers["content-disposition"] == "attachment; filename*=UTF-8''a%20b.bin"
    head = client.head("/body")
    assert (head.status_code, head.content) == (200, b"")
    for name in ("etag", "content-length", "repr-digest", "accept-ranges", "content-type"):
        assert head.headers[name] == answer.headers[name]


@pytest.mark.parametrize(
    ("header", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-99", 0, 100),
        ("bytes=10-19", 10, 20),
        ("bytes=90-", 90, 100),
        ("bytes=90-1000", 90, 100),
        ("bytes=99-99", 99, 100),
        ("bytes=-1", 99, 100),
        ("bytes=-100", 0, 100),
        ("bytes=-1000", 0, 100),
        ("Bytes= 3-4", 3, 5),
    ],
)
def test_a_range(client: TestClient, header: str, start: int, end: int) -> None:
    answer = client.get("/body", headers={"range": header})
    assert (answer.status_code, answer.content) == (206, BODY[start:end])
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/100"
    assert answer.headers["content-length"] == str(end - start)
    assert answer.headers["etag"] == ETAG


@pytest.mark.parametrize(
    "header",
    [
        "bytes=5-2",
        "bytes=-",
        "bytes=a-b",
        "items=0-1",
        "bytes",
        "bytes=0-1,5-6",
        "bytes=1 - 2",
        "bytes=²-5",
        "bytes=-+5",
    ],
)
def test_what_is_no_single_range_gives_the_whole(client: TestClient, header: str) -> None:
    answer = client.get("/body", headers={"range": header.encode("latin-1")})
    assert (answer.status_code, answer.content) == (200, BODY)
    assert "content-range" not in answer.headers


@pytest.mark.parametrize(
    ("path", "header"),
    [
        ("/body", "bytes=100-"),
        ("/body", "bytes=1000-2000"),
        ("/body", "bytes=-0"),
        ("/empty", "bytes=0-"),
        ("/empty", "bytes=-5"),
    ],
)
def test_a_range_behind_the_end(client: TestClient, path: str, header: str) -> None:
    answer = client.get(path, headers={"range": header})
    assert (answer.status_code, answer.json()["error"]["code"]) == (416, "range_not_satisfiable")
    assert answer.headers["content-range"] == f"bytes */{100 if path == '/body' else 0}"


def test_if_range(client: TestClient) -> None:
    for validator, status in (
        (ETAG, 206),
        ('"other"', 200),
        (f"W/{ETAG}", 200),
        ("Wed, 21 Oct 2026 07:28:00 GMT", 200),
    ):
        assert client.get("/body", headers={"range": "bytes=0-4", "if-range": validator}).status_code == status
    # With another validator, not even a range behind the end is an error.
    assert client.get("/body", headers={"range": "bytes=500-", "if-range": '"other"'}).status_code == 200


def test_if_none_match(client: TestClient) -> None:
    for known in (ETAG, f"W/{ETAG}", f'"other", {ETAG}', "*"):
        answer = client.get("/body", headers={"if-none-match": known, "range": "bytes=0-4"})
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["etag"] == ETAG
    assert client.get("/body", headers={"if-none-match": '"other"'}).status_code == 200


def test_if_match(client: TestClient) -> None:
    assert client.get("/body", headers={"if-match": ETAG}).status_code == 200
    answer = client.get("/body", headers={"if-match": '"other"'})
    assert (answer.status_code, answer.json()["error"]["code"]) == (412, "precondition_failed")


def test_head_knows_no_ranges(client: TestClient) -> None:
    for header in ("bytes=0-4", "bytes=500-"):
        answer = client.head("/body", headers={"range": header})
        assert (answer.status_code, answer.headers["content-length"], answer.content) == (200, "100", b"")


def test_an_empty_body(client: TestClient) -> None:
    answer = client.get("/empty")
    assert (answer.status_code, answer.content, answer.headers["content-length"]) == (200, b"", "0")
