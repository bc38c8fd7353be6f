"""A folder as a store: what the embedded service uses.

A write goes to a temporary name, is synced, renamed, and its folder synced: a power cut leaves the whole object or
none. Files are readable by the service's user only: they hold private rows.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from app.ids import sortable_token
from app.storage.interface import CHUNK, OCTETS, Stored, Writer, check_key

#: Unfinished writes lie here, on the same file system as what they become, and out of every prefix.
_INCOMING = ".incoming"
_ABANDONED_SECONDS = 86_400.0


class LocalStorage:
    """Objects are files below `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        (root / _INCOMING).mkdir(mode=0o700, parents=True, exist_ok=True)
        # What a killed process was writing; nothing that is still being written is a day old.
        for left in (root / _INCOMING).iterdir():
            with suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                    left.unlink()

    @classmethod
    def from_url(cls, url: str) -> LocalStorage:
        """From `file:///folder`."""
        return cls(Path(unquote(urlsplit(url).path)))

    def put_bytes(self, key: str, data: bytes, content_type: str = OCTETS) -> None:
        with self._incoming(key) as file:
            file.write(data)

    def put_file(self, key: str, path: Path, content_type: str = OCTETS) -> None:
        with path.open("rb") as source, self._incoming(key) as file:
            shutil.copyfileobj(source, file, CHUNK)

    @asynccontextmanager
    async def put_stream(self, key: str, content_type: str = OCTETS) -> AsyncIterator[Writer]:
        incoming = self._incoming(key)
        writer = _ThreadedWriter(await asyncio.to_thread(incoming.__enter__))
        try:
            yield writer
            await writer.flush()
        except BaseException:
            incoming.abort()
            raise
        await asyncio.to_thread(incoming.commit)

    def get_range(self, key: str, start: int, end: int) -> bytes:
        with self._path(key).open("rb") as file:
            file.seek(start)
            return file.read(max(end - start, 0))

    def stream(self, key: str, start: int = 0, end: int | None = None, chunk: int = CHUNK) -> Iterator[bytes]:
        with self._path(key).open("rb") as file:
            file.seek(start)
            left = float("inf") if end is None else end - start
            while left > 0 and (data := file.read(int(min(chunk, left)))):
                left -= len(data)
                yield data

    def get_file(self, key: str, path: Path) -> None:
        shutil.copyfile(self._path(key), path)

    def head(self, key: str) -> Stored | None:
        path = self._path(key)
        return Stored(key, path.stat().st_size) if path.is_file() else None

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def delete_prefix(self, prefix: str, keep: Collection[str] = ()) -> None:
        root, kept = self._path(prefix), [self._path(one) for one in keep]
        with suppress(FileNotFoundError):
            if not any(one.is_relative_to(root) for one in kept):
                shutil.rmtree(root)
            elif root not in kept:
                for path in list(root.iterdir()):
                    if path.is_file():
                        path.unlink()
                    else:
                        self.delete_prefix(f"{prefix}/{path.name}", keep)

    def names(self, prefix: str) -> Sequence[str]:
        with suppress(FileNotFoundError):
            return [path.name for path in self._path(prefix).iterdir() if path.is_dir() and any(path.iterdir())]
        return []

    def local_path(self, key: str) -> Path | None:
        return self._path(key)

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _incoming(self, key: str) -> _Incoming:
        return _Incoming(self._root / _INCOMING / sortable_token(), self._path(key))


class _Incoming:
    """A file under a temporary name that takes its own name on `commit`, or vanishes on `abort`."""

    def __init__(self, temporary: Path, path: Path) -> None:
        self._temporary, self._path = temporary, path

    def __enter__(self) -> BinaryIO:
        self._file = os.fdopen(os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
        return self._file

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()

    def commit(self) -> None:
        try:
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._temporary.replace(self._path)
        except BaseException:
            self._temporary.unlink(missing_ok=True)
            raise
        _sync_folder(self._path.parent)

    def abort(self) -> None:
        # Closing flushes, which fails on a full disk: the file goes either way.
        with suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)


class _ThreadedWriter:
    """Gathers small pieces and writes them in a thread, so that a slow disk does not hold up the event loop."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._pieces: list[bytes] = []
        self._size = 0

    async def write(self, data: bytes) -> None:
        self._pieces.append(data)
        self._size += len(data)
        if self._size >= CHUNK:
            await self.flush()

    async def flush(self) -> None:
        pieces, self._pieces, self._size = self._pieces, [], 0
        await asyncio.to_thread(self._file.writelines, pieces)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
