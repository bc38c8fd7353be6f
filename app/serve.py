"""`privtune serve` and `privtune worker`: the embedded service in one command, and the worker on its own."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from app import processes, tether
from app.bootstrap import bootstrap
from app.db import migrate
from app.db.session import Database
from app.interrupts import Interrupts
from app.main import create_app
from app.settings import Settings

#: Queues that a worker can read, in the order of their processes.
QUEUES = ("training", "files")


class StartError(RuntimeError):
    """The service cannot start; the text says why and what to do."""


def add_commands(commands: Any) -> None:
    """Registers `serve` and `worker` with argparse's subparsers; each sets `run`."""
    serving = commands.add_parser("serve", help="run the API, and with it a worker and a broker")
    serving.add_argument("--host", default="127.0.0.1")
    serving.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    serving.add_argument("--data-dir", type=Path, help="where everything is kept (PRIVTUNE_DATA_DIR)")
    serving.add_argument("--no-worker", action="store_true", help="API only: workers run elsewhere")
    serving.set_defaults(run=_serve)
    working = commands.add_parser("worker", help="run a worker")
    working.add_argument("--queues", default=",".join(QUEUES), help="which kinds of work, separated by commas")
    working.add_argument("--data-dir", type=Path, help="where everything is kept (PRIVTUNE_DATA_DIR)")
    working.set_defaults(run=_work)


def _serve(arguments: argparse.Namespace) -> int:
    try:
        serve(_settings(arguments.data_dir), arguments.host, arguments.port, with_worker=not arguments.no_worker)
    except (StartError, KeyboardInterrupt) as error:
        if isinstance(error, StartError):
            _say(f"privtune: {error}", sys.stderr)
            return 1
    return 0


def _work(arguments: argparse.Namespace) -> int:
    """Becomes the worker: `app` may not import it, and nothing of this process is needed any more."""
    settings = _settings(arguments.data_dir)
    _keep_to_ourselves(settings.data_dir)
    argv = [*tether.python("-m", "worker"), "--queues", arguments.queues]
    os.execve(argv[0], argv, _child_environment(settings))  # noqa: S606
    return 1  # not reached


def serve(settings: Settings, host: str, port: int, *, with_worker: bool = True) -> None:
    """Runs until Ctrl-C or SIGTERM, then stops the worker (its job goes back to the queue) and the broker.

    Raises StartError when the port is taken, another service uses the data folder, or the broker does not start.
    """
    tether.become_unreadable()
    with Interrupts() as interrupts:
        _keep_to_ourselves(settings.data_dir)
        with _only_one(settings.data_dir), _listen(host, port) as listener:
            migrate.upgrade(settings.database)
            _first_start(settings)
            interrupts.only_note()  # what is started from here on is stopped in its order
            services: list[processes.Service] = []
            if settings.redis_url is None:
                settings, service = _broker(settings)
                services.append(service)
            if with_worker:
                services.append(_worker(settings))
            with _kept(services):
                interrupts.check()
                url = "http://{}:{}".format(*listener.getsockname()[:2])
                _say(f"privtune listens on {url} (API under /v1, documentation under /docs). Ctrl-C stops it.")
                with contextlib.suppress(KeyboardInterrupt):  # it came before there was a server to stop
                    server = _server(settings)
                    interrupts.pass_to(server.handle_exit)
                    server.run(sockets=[listener])
                _say("privtune stops.")


class _Server(uvicorn.Server):
    """One that leaves signals to whoever runs it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _server(settings: Settings) -> _Server:
    config = uvicorn.Config(
        create_app(settings), log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=3
    )
    return _Server(config)


def _keep_to_ourselves(data_dir: Path) -> None:
    """What this process and its children make is their user's alone; and so is what an older version left open.

    A folder that belongs to somebody else stays as its owner has it.
    """
    os.umask(0o077)
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path, mode in [(data_dir, 0o700), *((found, 0o600) for found in data_dir.glob("privtune.db*"))]:
        with contextlib.suppress(PermissionError, FileNotFoundError):
            path.chmod(mode)


def _settings(data_dir: Path | None) -> Settings:
    return Settings() if data_dir is None else Settings(data_dir=data_dir)


@contextlib.contextmanager
def _only_one(data_dir: Path) -> Iterator[None]:
    """Two services on one folder would be two brokers on one append-only file."""
    with open(data_dir / "serve.lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError(f"another `privtune serve` uses {data_dir}.") from None
        yield


@contextlib.contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    """Taken before anything else is started, so that a port in use is one line and no traceback."""
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise StartError(f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}.") from None
    with listener:
        yield listener


def _first_start(settings: Settings) -> None:
    """Makes project, budget and key on an empty database; shows a key that it made, once."""
    path = settings.data_dir / "api_key"
    database = Database(settings.database)
    try:
        with database.writing() as session:
            token = bootstrap(session, settings)
            if token is None or settings.api_key is not None:
                return
            # Before the commit: a key that nobody could read would lock everyone out.
            path.unlink(missing_ok=True)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                file.write(token + "\n")
    finally:
        database.dispose()
    _say(f"Your admin API key (also in {path}; it is not shown again):\n\n    {token}\n")


def _broker(settings: Settings) -> tuple[Settings, processes.Service]:
    """The embedded Valkey, and the settings that name it where its socket had to move to a shorter path."""
    folder = settings.data_dir.resolve() / "valkey"
    unix_socket = processes.socket_folder(settings.data_dir, "valkey") / settings.broker_socket.name
    if unix_socket != settings.broker_socket:
        settings = settings.model_copy(update={"redis_url": f"redis+socket://{unix_socket}"})
    try:
        return settings, processes.valkey(folder, unix_socket)
    except RuntimeError as error:
        raise StartError(str(error)) from None


def _worker(settings: Settings) -> processes.Service:
    return processes.Service("worker", tether.python("-m", "worker"), _child_environment(settings))


def _child_environment(settings: Settings) -> dict[str, str]:
    env = {**os.environ, "PRIVTUNE_DATA_DIR": str(settings.data_dir.resolve())}
    if settings.redis_url is not None:
        env["REDIS_URL"] = settings.redis_url
    return tether.importable(env)


@contextlib.contextmanager
def _kept(services: list[processes.Service]) -> Iterator[None]:
    """Keeps them running in a thread of their own, which lives until all of them have ended."""
    keeper = processes.Keeper(services)

    def run() -> None:
        with contextlib.suppress(OSError, RuntimeError):  # `wait_until_up` raises it where it can be told
            keeper.run()

    thread = threading.Thread(target=run, name="keeper")
    thread.start()
    try:
        try:
            keeper.wait_until_up()
        except (OSError, RuntimeError) as error:
            raise StartError(str(error)) from None
        yield
    finally:
        keeper.stop()
        thread.join()


def _say(text: str, stream: Any = None) -> None:
    stream = stream or sys.stdout
    stream.write(text + "\n")
    stream.flush()
