"""POST /v1/files: what is taken, what is refused, and that a refused upload leaves nothing."""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app.files import limits, service
from app.files import upload as upload_module
from app.settings import Settings
from tests.app.files.conftest import Upload

DATA = b"text,label\ngood,pos\nbad,neg\n"


def stored(settings: Settings) -> list[Path]:
    """Of files; a look at raw rows moves the head of its budget's ledger, too."""
    found = (settings.data_dir / "storage").rglob("*")
    return [path for path in found if path.is_file() and path.name != "head.json"]


def refused(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code), answer.text
    return error


def test_an_upload_is_stored_as_it_came(upload: Upload, client: TestClient, settings: Settings) -> None:
    file = upload(DATA, "reviews 2026.csv")
    assert file["object"] == "file"
    assert file["status"] == "uploaded"
    assert file["purpose"] == "fine-tune"
    assert file["bytes"] == len(DATA)
    assert file["filename"] == "reviews 2026.csv"
    assert file["public"] is False
    assert file["privacy_unit"] == "record"
    assert file["privacy_budget"].startswith("pb-")
    assert file["expires_at"] is None
    content = client.get(f"/v1/files/{file['id']}/content")
    assert content.content == DATA
    assert content.headers["etag"] == f'"{hashlib.sha256(DATA).hexdigest()}"'
    (path,) = stored(settings)
    assert path.read_bytes() == DATA


def test_fields_may_follow_the_file(client: TestClient) -> None:
    body = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.csv"\r\n\r\n' + DATA + b"\r\n"
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--b--\r\n'
    )
    answer = client.post("/v1/files", content=body, headers={"content-type": "multipart/form-data; boundary=b"})
    assert answer.status_code == 200
    assert client.get(f"/v1/files/{answer.json()['id']}/content").content == DATA


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\me\\data.csv", "data.csv"),
        ('größe "1".csv', 'größe "1".csv'),
        ("a\u202eb.csv", "ab.csv"),
        ("x" * 300 + ".csv", "x" * 255),
        ("/", "upload"),
    ],
)
def test_a_filename_is_for_people_only(upload: Upload, settings: Settings, given: str, shown: str) -> None:
    file = upload(DATA, given)
    assert file["filename"] == shown
    (path,) = stored(settings)
    assert path.parent.name == file["id"]
    assert path.name == "source"


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({}, 400, "invalid_request", "purpose"),
        ({"purpose": "assistants"}, 400, "purpose_not_supported", "purpose"),
        ({"purpose": "fine-tune", "privacy_unit": '{"column": 3}'}, 400, "invalid_request", "privacy_unit"),
        ({"purpose": "fine-tune", "privacy_unit": '{"columm": "patient_id"}'}, 400, "invalid_request", "privacy_unit"),
        ({"purpose": "fine-tune", "privacy_unit": '{"column": "patient_id"'}, 400, "invalid_request", "privacy_unit"),
        ({"purpose": "fine-tune", "privacy_unit": "patient_id" * 7}, 400, "invalid_request", "privacy_unit"),
        ({"purpose": "fine-tune", "privacy_unit": "patient_id\n"}, 400, "invalid_request", "privacy_unit"),
        ({"purpose": "fine-tune", "privacy_unit[column]": ""}, 400, "invalid_request", None),
        ({"purpose": "fine-tune", "privacy_unit[column]": "a", "privacy_unit": "b"}, 400, "invalid_request", None),
        ({"purpose": "fine-tune", "privacy_unit": "patient_id", "public": "1"}, 400, "invalid_request", "privacy_unit"),
        ({"purpose": "fine-tune", "privacy_unti": "patient_id"}, 400, "unknown_field", None),
        ({"purpose": "fine-tune", "public": "perhaps"}, 400, "invalid_request", "public"),
        ({"purpose": "fine-tune", "privacy_budget": "pb-none"}, 404, "privacy_budget_not_found", None),
        ({"purpose": "fine-tune", "expires_after[seconds]": "5"}, 400, "invalid_request", None),
        ({"purpose": ["fine-tune", "fine-tune"]}, 400, "invalid_multipart", None),
        ({"purpose": "x" * 5000}, 400, "invalid_request", "purpose"),
    ],
)
def test_wrong_fields_are_named_and_nothing_is_stored(
    client: TestClient, settings: Settings, fields: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    answer = client.post("/v1/files", files={"file": ("a.csv", DATA)}, data=fields)
    error = refused(answer, status, code)
    if param:
        assert error["param"] == param
    assert "patient_id" not in answer.text
    assert "perhaps" not in answer.text
    assert stored(settings) == []


@pytest.mark.parametrize(
    ("content_type", "body", "code"),
    [
        ("application/json", b"{}", "invalid_multipart"),
        ("multipart/form-data", b"x", "invalid_multipart"),
        ("multipart/form-data; boundary=b", b"", "missing_file"),
        ("multipart/form-data; boundary=b", b"garbage", "invalid_multipart"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--b--\r\n',
            "missing_file",
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.csv"\r\n\r\ntext,label\ncut off he',
            "invalid_multipart",
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="\xff.csv"\r\n\r\ntext\r\n--b--\r\n',
            "invalid_multipart",
        ),
    ],
)
def test_a_broken_form_is_refused(
    client: TestClient, settings: Settings, content_type: str, body: bytes, code: str
) -> None:
    refused(client.post("/v1/files", content=body, headers={"content-type": content_type}), 400, code)
    assert stored(settings) == []


@pytest.mark.parametrize("declared", [True, False])
def test_a_file_over_the_limit_is_refused_even_unannounced(
    live_server: Any, api_key: str, settings: Settings, declared: bool
) -> None:
    settings.max_upload_bytes = 1_000_000
    head = (
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.csv"\r\n\r\n'
    )
    pieces = [head, *[b"x" * 100_000] * 50, b"\r\n--b--\r\n"]
    headers = {"authorization": f"Bearer {api_key}", "content-type": "multipart/form-data; boundary=b"}
    body: Any = b"".join(pieces) if declared else iter(pieces)
    error = refused(httpx.post(f"{live_server.url}/v1/files", content=body, headers=headers), 413, "file_too_large")
    assert error["max_bytes"] == 1_000_000
    assert stored(settings) == []


def test_an_upload_that_is_cut_leaves_nothing(live_server: Any, api_key: str, settings: Settings) -> None:
    host, port = live_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            f"POST /v1/files HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {api_key}\r\n"
            "content-type: multipart/form-data; boundary=b\r\ncontent-length: 9000000\r\n\r\n"
            '--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
            '--b\r\nContent-Disposition: form-data; name="file"; filename="a.csv"\r\n\r\n'.encode()
            + bytes(3_000_000)
        )
        eventually(lambda: stored(settings) != [])
    eventually(lambda: stored(settings) == [])
    listed = httpx.get(f"{live_server.url}/v1/files", headers={"authorization": f"Bearer {api_key}"})
    assert listed.json()["data"] == []


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "trouble", [OSError(28, "No space left on device", "/a/path"), OSError(110, "Connection timed out", "/a/path")]
)
def test_a_full_or_silent_disk_is_no_fault_of_the_request(
    app: FastAPI, client: TestClient, monkeypatch: pytest.MonkeyPatch, trouble: OSError
) -> None:
    class Full:
        @asynccontextmanager
        async def put_stream(self, key: str) -> AsyncIterator[Any]:
            raise trouble
            yield

    monkeypatch.setattr(app.state, "storage", Full())
    answer = client.post("/v1/files", files={"file": ("a.csv", DATA)}, data={"purpose": "fine-tune"})
    refused(answer, 503, "storage_unavailable")
    assert "/a/path" not in answer.text
    assert "x-should-retry" not in answer.headers


def test_a_file_of_exactly_the_limit_is_taken(upload: Upload, settings: Settings) -> None:
    settings.max_upload_bytes = len(DATA)
    assert upload(DATA)["bytes"] == len(DATA)


def test_the_key_must_reach_far_enough(client: TestClient, make_key: Callable[..., str], settings: Settings) -> None:
    def post(key: str | None, **fields: str) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {"authorization": ""}
        return client.post(
            "/v1/files", files={"file": ("a.csv", DATA)}, data={"purpose": "fine-tune", **fields}, headers=headers
        )

    refused(post(make_key("read")), 403, "insufficient_scope")
    refused(post(None), 401, "missing_api_key")
    refused(post(make_key("submit"), public="true"), 403, "insufficient_scope")
    assert stored(settings) == []
    assert post(make_key("submit")).status_code == 200


def test_an_upload_sent_twice_with_its_key_is_one_file(client: TestClient, settings: Settings) -> None:
    def post(data: bytes, key: str) -> httpx.Response:
        return client.post(
            "/v1/files",
            files={"file": ("a.csv", data)},
            data={"purpose": "fine-tune"},
            headers={"idempotency-key": key},
        )

    first = post(DATA, "one").json()
    assert post(DATA, "one").json()["id"] == first["id"]
    assert post(DATA, "two").json()["id"] != first["id"]
    assert len(stored(settings)) == 2
    refused(post(DATA + b"more,pos\n", "one"), 409, "idempotency_mismatch")
    assert len(stored(settings)) == 2


def test_a_key_asks_for_the_same_of_its_file(client: TestClient) -> None:
    def post(**fields: str) -> httpx.Response:
        form = {"purpose": "fine-tune", **fields}
        return client.post("/v1/files", files={"file": ("a.csv", DATA)}, data=form, headers={"idempotency-key": "one"})

    expiry = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    budget_id = client.get("/v1/privacy_budgets").json()["data"][0]["id"]
    first = post(**expiry).json()
    assert post(**expiry).json()["id"] == first["id"]
    assert post(**expiry, privacy_budget=budget_id).json()["id"] == first["id"]
    refused(post(), 409, "idempotency_mismatch")
    refused(post(**{**expiry, "expires_after[seconds]": "7200"}), 409, "idempotency_mismatch")
    refused(post(**expiry, privacy_budget="pb-another"), 409, "idempotency_mismatch")
    assert client.delete(f"/v1/files/{first['id']}").status_code == 200
    refused(post(**expiry), 409, "file_deleted")


def test_expiry_is_kept(upload: Upload) -> None:
    file = upload(DATA, **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"})
    assert file["expires_at"] - file["created_at"] == 3600


def test_an_upload_that_takes_too_long_is_ended_before_a_sweep_could_take_it_for_abandoned(
    live_server: Any, api_key: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a sweep removes is older than any upload may be."""
    assert service._ORPHAN_SECONDS > limits.MAX_RECEIVING_SECONDS
    monkeypatch.setattr(upload_module, "MAX_RECEIVING_SECONDS", 0.3)
    host, port = live_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.settimeout(20)
        connection.sendall(
            f"POST /v1/files HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {api_key}\r\n"
            "content-type: multipart/form-data; boundary=b\r\ncontent-length: 9000000\r\n\r\n"
            '--b\r\nContent-Disposition: form-data; name="file"; filename="a.csv"\r\n\r\n'.encode()
            + bytes(1_000_000)
        )
        assert b"upload_too_slow" in connection.recv(65_536)
    eventually(lambda: stored(settings) == [])
