"""SHA-256 of large files that rarely change: computed once, kept in the data folder by size and time of change."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import threading
from pathlib import Path

_FILE = "model_digests.json"

#: One file is hashed at a time: a second request for the same one waits, and finds it done.
_lock = threading.Lock()


def sha256(path: Path, data_dir: Path | None = None) -> str:
    """Of the file's bytes, in hexadecimal. data_dir: where the result is kept; None: in this process alone."""
    status = path.stat()
    entry = [status.st_size, status.st_mtime_ns]
    with _lock:
        known = _memory if data_dir is None else _read(data_dir)
        found = known.get(str(path))
        if found is not None and found[:2] == entry:
            return str(found[2])
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        known[str(path)] = [*entry, digest]
        if data_dir is not None:
            _write(data_dir, known)
        return digest


_memory: dict[str, list[int | str]] = {}


def _read(data_dir: Path) -> dict[str, list[int | str]]:
    """What is known; nothing where the file is missing or was damaged: then all is computed again."""
    try:
        known = json.loads((data_dir / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {path: entry for path, entry in known.items() if isinstance(entry, list) and len(entry) == 3}


def _write(data_dir: Path, known: dict[str, list[int | str]]) -> None:
    """A full disk loses the memory of a digest, no more."""
    with contextlib.suppress(OSError):
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=data_dir, delete=False, encoding="utf-8") as file:
            json.dump({path: entry for path, entry in known.items() if Path(path).exists()}, file)
        os.replace(file.name, data_dir / _FILE)
