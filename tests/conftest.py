"""Fixtures of every test: real databases, a real broker, the real application; no socket to the outside."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis
import structlog
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app import tether
from app.auth import service as auth
from app.bootstrap import bootstrap
from app.db.migrate import upgrade
from app.db.session import Database
from app.logging import without_exception_text
from app.main import create_app
from app.processes import valkey
from app.settings import Settings
from tests.answers import Documentation
from tests.postgres import Postgres

_DATABASES = ("sqlite", "postgresql")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "every_database: runs on SQLite and on PostgreSQL.")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`database` is SQLite; under the marker `every_database` a test runs once on each."""
    if "database_url" in metafunc.fixturenames:
        marked = metafunc.definition.get_closest_marker("every_database") is not None
        metafunc.parametrize("database_url", _DATABASES if marked else _DATABASES[:1], indirect=True)


@pytest.fixture(autouse=True, scope="session")
def _no_outside_sockets() -> Iterator[None]:
    """A test that talks to another machine fails at once."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"A test wanted to connect to {address[0]}.")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


@pytest.fixture(autouse=True, scope="session")
def _logs() -> None:
    """Our logs through the standard library's, where pytest shows them with a failed test."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.add_log_level,
            without_exception_text,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
    )


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# --- databases -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def _sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty database file, without a journal beside it."""
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    upgrade(f"sqlite:///{path}")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server of this run, with a migrated template."""
    with Postgres.start() as server:
        upgrade(server.create("template"))
        yield server


@pytest.fixture
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A migrated, empty database of this test's own."""
    if request.param == "sqlite":
        path = tmp_path / "privtune.db"
        shutil.copy(request.getfixturevalue("_sqlite_template"), path)
        yield f"sqlite:///{path}"
    else:
        server = request.getfixturevalue("postgres")
        with server.copy("template") as url:
            yield url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """Sessions on it. An application made of `settings` uses the same database through an engine of its own."""
    opened = Database(database_url)
    yield opened
    opened.dispose()


# --- the application -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def _valkey() -> Iterator[Path]:
    """A Valkey of this run; its socket's path is short enough for an address."""
    folder = Path(tempfile.mkdtemp(prefix="pt-vk-"))
    service = valkey(folder, folder / "valkey.sock")
    process = tether.popen(service.argv, env=service.env)
    assert service.wait_until_ready is not None
    service.wait_until_ready()
    yield folder / "valkey.sock"
    tether.kill_group(process)
    shutil.rmtree(folder)


@pytest.fixture
def broker(_valkey: Path) -> str:
    """An empty, real broker's URL. A test that asks for it finds it in `settings`, too."""
    with redis.Redis(unix_socket_path=str(_valkey)) as connection:
        connection.flushall()
    return f"redis+socket://{_valkey}"


@pytest.fixture
def settings(
    request: pytest.FixtureRequest, tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> Settings:
    """Settings on this test's own database and folder, whatever the environment says.

    No broker answers unless the test asks for `broker`: a hint is lost then, which is no error.
    """
    for name in os.environ:
        if name in ("DATABASE_URL", "REDIS_URL", "STORAGE_URL") or name.startswith("PRIVTUNE_"):
            monkeypatch.delenv(name)
    broker = request.getfixturevalue("broker") if "broker" in request.fixturenames else None
    return Settings(data_dir=tmp_path / "data", database_url=database_url, redis_url=broker)


@pytest.fixture
def api_key(database: Database, settings: Settings) -> str:
    """The first admin key of a database that is set up."""
    with database.writing() as session:
        token = bootstrap(session, settings)
    assert token is not None
    return token


@pytest.fixture
def project_id(database: Database, api_key: str) -> str:
    """The default project."""
    with database.reading() as session:
        return auth.authenticate(session, api_key).project_id


@pytest.fixture
def make_key(database: Database, project_id: str) -> Callable[..., str]:
    """A further key: `make_key("read")`, `make_key("submit", project="other")` (made, budget included, where new)."""
    from app.budgets import service as budgets

    def make(*scopes: str, project: str | None = None) -> str:
        with database.writing() as session:
            owner = project_id
            if project is not None:
                try:
                    owner = auth.get_project(session, project).id
                except auth.NotFound:
                    owner = auth.create_project(session, project).id
                    budgets.create(
                        session,
                        project_id=owner,
                        name=project,
                        epsilon_limit=10.0,
                        delta=1e-6,
                        actor="test",
                        is_default=True,
                    )
            return auth.create_key(session, owner, "test", scopes or ("submit",))[1]

    return make


@pytest.fixture
def app(settings: Settings, api_key: str) -> Iterator[FastAPI]:
    """The application on a database that is set up."""
    application = create_app(settings)
    yield application
    application.state.database.dispose()


@pytest.fixture
def client(app: FastAPI, api_key: str) -> Iterator[TestClient]:
    """Requests with the admin key; another one goes into `headers={"authorization": f"Bearer {key}"}`. Whatever a
    test asks, the answer is as the documentation says."""
    documentation = Documentation(app.openapi())

    def check(response: Any) -> None:
        media = response.headers.get("content-type", "")
        if media == "application/json" and response.request.method != "HEAD":
            response.read()
            documentation.require(
                response.request.method, response.request.url.path, response.status_code, response.content
            )

    with TestClient(app, headers={"authorization": f"Bearer {api_key}"}) as opened:
        opened.event_hooks = {"response": [check]}
        yield opened


@dataclass
class LiveServer:
    """The application behind a real socket. Use it through `with`, or the fixture `live_server`."""

    app: FastAPI
    server: uvicorn.Server = field(init=False)
    url: str = field(init=False)

    def __enter__(self) -> LiveServer:
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(self.app, log_config=None, timeout_graceful_shutdown=2))
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 10
        while not self.server.started:
            assert time.monotonic() < deadline, "uvicorn did not start"
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join(10)


@pytest.fixture
def live_server(app: FastAPI) -> Iterator[LiveServer]:
    """The application on a loopback port: `live_server.url`."""
    with LiveServer(app) as server:
        yield server


@pytest.fixture
def openai_client(live_server: LiveServer, api_key: str) -> Iterator[Any]:
    """The unmodified client, with the admin key."""
    import openai

    with openai.OpenAI(base_url=f"{live_server.url}/v1", api_key=api_key) as opened:
        yield opened
