"""SHA-256 of large files that rarely change: computed once, kept in the data folder by size, time of change and inode.

No lock is held while a file is read, but the file's own: who asks for one waits for that one alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path

_FILE = "model_digests.json"

#: By path: [size, nanoseconds, inode, digest].
_Known = dict[str, list[int | str]]

#: Of what follows.
_lock = threading.Lock()
_memory: _Known = {}
_files: dict[Path, tuple[tuple[int, ...], _Known]] = {}
_turns: dict[str, threading.Lock] = {}
_queued: set[Path] = set()
_waiting: queue.SimpleQueue[tuple[Path, Path]] = queue.SimpleQueue()
_background: threading.Thread | None = None


class Unknown(LookupError):
    """Nobody has hashed the file as it is now."""


def sha256(path: Path, data_dir: Path | None = None) -> str:
    """Of the file's bytes, in hexadecimal. data_dir: where the result is kept; None: in this process alone."""
    with contextlib.suppress(Unknown):
        return known(path, data_dir)
    with _lock:
        turn = _turns.setdefault(str(path), threading.Lock())
    with turn:  # a second request for the same file waits, and finds it done
        with contextlib.suppress(Unknown):
            return known(path, data_dir)
        state = _state(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if _state(path) == state:  # else it was being written
            _keep(path, [*state, digest], data_dir)
        return digest


def known(path: Path, data_dir: Path | None = None) -> str:
    """The same where it was computed before; Unknown, and OSError, else. Takes no time."""
    state = _state(path)
    with _lock:
        found = (_memory if data_dir is None else _read(data_dir)).get(str(path))
    if found is None or tuple(found[:3]) != state:
        raise Unknown(str(path))
    return str(found[3])


def later(paths: Iterable[Path], data_dir: Path) -> None:
    """Computes and keeps them in the background, one file at a time."""
    global _background
    with _lock:
        fresh = [path for path in paths if path not in _queued]
        _queued.update(fresh)
        if fresh and _background is None:
            _background = threading.Thread(target=_hash_waiting, name="digests", daemon=True)
            _background.start()
    for path in fresh:
        _waiting.put((path, data_dir))


def _hash_waiting() -> None:
    while True:
        path, data_dir = _waiting.get()
        with contextlib.suppress(OSError):  # it went away
            sha256(path, data_dir)
        with _lock:
            _queued.discard(path)


def _state(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _read(data_dir: Path) -> _Known:
    """What is known; nothing where the file is missing or was damaged: then all is computed again."""
    path = data_dir / _FILE
    try:
        state = _state(path)
        if path not in _files or _files[path][0] != state:
            entries = json.loads(path.read_text(encoding="utf-8"))
            known = {name: entry for name, entry in entries.items() if isinstance(entry, list) and len(entry) == 4}
            _files[path] = (state, known)
        return _files[path][1]
    except (OSError, ValueError, AttributeError):
        return {}


def _keep(path: Path, entry: list[int | str], data_dir: Path | None) -> None:
    """A full disk loses the memory of a digest, no more."""
    with _lock:
        if data_dir is None:
            _memory[str(path)] = entry
            return
        kept = {name: value for name, value in _read(data_dir).items() if Path(name).exists()}
        with contextlib.suppress(OSError):
            data_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=data_dir, delete=False, encoding="utf-8") as file:
                json.dump({**kept, str(path): entry}, file)
            os.replace(file.name, data_dir / _FILE)
