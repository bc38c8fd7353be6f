"""Job folders: where one trainer process reads and writes, private rows included. Mode 700, removed when it ends.

A folder is locked by the worker that made it; one whose worker was killed is removed by the next that starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import structlog

from app.processes import socket_folder
from app.settings import Settings
from app.storage.interface import Storage

log = structlog.get_logger(__name__)

_LOCK, _KEPT = ".lock", "kept"

#: In the names of what is kept back: of a path that a trainer can guess it can learn how large the rows are.
_UNTOLD = secrets.token_hex(16)


class DamagedCheckpoint(RuntimeError):
    """What the store gives back is not what was put into it."""


class JobFolder:
    """A folder and the lock that says its worker lives."""

    def __init__(self, path: Path, lock: IO[bytes]) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls, root: Path) -> JobFolder:
        """A fresh, locked folder of mode 700."""
        with _locked(root / _LOCK):
            path = Path(tempfile.mkdtemp(prefix="job-", dir=root))
            lock = open(path / _LOCK, "wb")
            fcntl.flock(lock, fcntl.LOCK_EX)
        return cls(path, lock)

    def remove(self) -> None:
        """Removes what was kept back beside the folder, then it and all in it. What cannot go keeps the folder and its
        lock, for `remove_abandoned` to try again."""
        name = f"{_KEPT}-{self.path.name}"  # all of it, of workers from before names were made up
        kept = [self.path.with_name(name), *self.path.parent.glob(f"{name}-*")]  # whichever worker kept it
        for each in kept:
            shutil.rmtree(each, ignore_errors=True)
        if not any(each.exists() for each in kept):
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            for each in self.path.glob("*"):
                shutil.rmtree(each, ignore_errors=True)  # nothing, of what is no folder
                if each.name != _LOCK:
                    with contextlib.suppress(OSError):
                        each.unlink()
        if self.path.exists():
            log.error("job_folder_not_removed", folder=self.path.name)
        self._lock.close()


def kept_back_from(folder: Path) -> Path:
    """Beside a job's folder, where only this process knows: what the job's process is not given yet."""
    return folder.with_name(f"{_KEPT}-{folder.name}-{_UNTOLD}")


def folders_root(settings: Settings) -> Path:
    """Where job folders live: short enough for the socket in each."""
    return socket_folder(settings.data_dir, "jobs")


def remove_abandoned(root: Path) -> int:
    """Removes the folders of workers that were killed; the number of them."""
    removed = 0
    with _locked(root / _LOCK):
        for path in root.glob("job-*"):
            try:
                lock = open(path / _LOCK, "wb")
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                continue
            except FileNotFoundError:
                lock = open(os.devnull, "wb")
            JobFolder(path, lock).remove()
            removed += not path.exists()
    return removed


def put_folder(storage: Storage, prefix: str, folder: Path) -> dict[str, str]:
    """Stores every file of a folder under `prefix`; SHA-256 by relative name, for `get_folder`."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            name = path.relative_to(folder).as_posix()
            storage.put_file(f"{prefix}/{name}", path)
            digests[name] = sha256(path)
    return digests


def get_folder(storage: Storage, prefix: str, digests: Mapping[str, str], folder: Path) -> None:
    """The inverse of `put_folder`. Raises DamagedCheckpoint where a digest does not match."""
    for name, digest in digests.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.get_file(f"{prefix}/{name}", path)
        if sha256(path) != digest:
            raise DamagedCheckpoint(name)


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _locked:
    """Holds a lock file for a block."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        self._file = open(self._path, "wb")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        self._file.close()
