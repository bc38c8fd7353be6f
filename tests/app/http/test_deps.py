"""Who may call, and when a unit of work is committed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import event

from app.auth import service as auth
from app.db.session import Database, after_commit
from app.errors import InvalidRequest
from app.http.deps import Admin, DatabaseDep, Reader, Reading, SecretKeyDep, SettingsDep, Submitter, Writing

router = APIRouter()
seen: dict[str, Any] = {}


@router.get("/probe/read")
def read(session: Reading, caller: Reader) -> str:
    return caller.project_id


@router.get("/probe/submit")
def submit(caller: Submitter) -> str:
    return caller.project_id


@router.get("/probe/admin")
def admin(caller: Admin) -> str:
    return caller.project_id


@router.post("/probe/write/{name}")
def write(name: str, session: Writing, caller: Submitter) -> str:
    project = auth.create_project(session, name)
    after_commit(session, lambda: seen.setdefault("committed", name))
    if name == "refused":
        raise InvalidRequest("no", "No.")
    return project.id


@router.post("/probe/write-in-reading")
def write_in_reading(session: Reading) -> str:
    return auth.create_project(session, "lost").id


@router.get("/probe/handles")
def handles(settings: SettingsDep, database: DatabaseDep, secret: SecretKeyDep) -> int:
    assert settings.database_url in str(database.engine.url)
    return len(secret)


@pytest.fixture
def client(app: FastAPI, client: TestClient) -> TestClient:
    seen.clear()
    app.include_router(router)
    return client


def _bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


@pytest.mark.parametrize("path", ["/probe/read", "/probe/submit", "/probe/admin"])
@pytest.mark.parametrize("scope", ["read", "submit", "admin"])
def test_each_scope_reaches_exactly_its_routes(
    client: TestClient, make_key: Callable[..., str], path: str, scope: str
) -> None:
    order = ["read", "submit", "admin"]
    allowed = order.index(scope) >= order.index(path.rpartition("/")[2])
    response = client.get(path, headers=_bearer(make_key(scope)))
    assert response.status_code == (200 if allowed else 403)
    if not allowed:
        assert response.json()["error"]["code"] == "insufficient_scope"


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic YTpi", "Bearer pt-nonsense", "Bearer é"])
def test_no_good_key_no_answer(client: TestClient, header: str) -> None:
    response = client.get("/probe/read", headers={"authorization": header.encode("latin-1")})
    assert response.status_code == 401
    assert response.json()["error"]["type"] == "authentication_error"


def test_a_revoked_key_is_refused_at_once(client: TestClient, make_key: Callable[..., str], database: Database) -> None:
    key = make_key("read")
    assert client.get("/probe/read", headers=_bearer(key)).status_code == 200
    with database.writing() as session:
        auth.revoke_key(session, auth.authenticate(session, key).key_id)
    assert client.get("/probe/read", headers=_bearer(key)).status_code == 401


def test_the_key_decides_the_project(client: TestClient, make_key: Callable[..., str], project_id: str) -> None:
    assert client.get("/probe/read").json() == project_id
    assert client.get("/probe/read", headers=_bearer(make_key("read", project="other"))).json() != project_id


def test_the_commit_comes_before_the_answer(client: TestClient, app: FastAPI, database: Database) -> None:
    """The row can be read from elsewhere by the time the answer's first byte is sent."""
    found: list[bool] = []

    class Watch:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async def look(message: Any) -> None:
                if message["type"] == "http.response.start":
                    with database.reading() as session:
                        found.append(auth.repository.find_project(session, "early") is not None)
                    assert seen == {"committed": "early"}
                await send(message)

            await self.inner(scope, receive, look)

    app.middleware_stack = Watch(app.middleware_stack)
    assert client.post("/probe/write/early").status_code == 200
    assert found == [True]


def test_an_error_leaves_nothing_behind(client: TestClient, database: Database) -> None:
    assert client.post("/probe/write/refused").status_code == 400
    assert seen == {}
    with database.reading() as session:
        assert auth.repository.find_project(session, "refused") is None


def test_a_commit_that_fails_is_no_success(client: TestClient, app: FastAPI) -> None:
    def fail(_connection: Any) -> None:
        raise RuntimeError("disk full")

    event.listen(app.state.database.engine, "commit", fail)
    assert client.post("/probe/write/doomed").status_code == 500
    assert seen == {}


def test_a_reading_route_cannot_write(client: TestClient, database: Database) -> None:
    assert client.post("/probe/write-in-reading").status_code >= 500
    with database.reading() as session:
        assert auth.repository.find_project(session, "lost") is None


def test_a_stranger_does_not_even_open_a_transaction(client: TestClient, app: FastAPI) -> None:
    begun: list[bool] = []
    event.listen(app.state.database.engine, "begin", lambda _: begun.append(True))
    assert client.post("/probe/write/x", headers={"authorization": ""}).status_code == 401
    assert begun == []


@pytest.mark.every_database
def test_no_request_holds_two_connections(client: TestClient, app: FastAPI) -> None:
    """With a second one, a full pool would be a deadlock of requests that wait for each other."""
    out, most, lock = 0, 0, threading.Lock()

    def count(change: int) -> None:
        nonlocal out, most
        with lock:
            out += change
            most = max(most, out)

    event.listen(app.state.database.engine, "checkout", lambda *_: count(1))
    event.listen(app.state.database.engine, "checkin", lambda *_: count(-1))
    assert client.post("/probe/write/one").status_code == 200
    assert client.get("/probe/read").status_code == 200
    assert (out, most) == (0, 1)


def test_handles(client: TestClient) -> None:
    assert client.get("/probe/handles").json() == 32
