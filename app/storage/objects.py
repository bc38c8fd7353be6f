"""S3, Google Cloud Storage and Azure as stores, through obstore."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import BaseError
from obstore.store import from_url

from app.storage.interface import CHUNK, OCTETS, StorageUnavailable, Stored, Writer, check_key

#: Parts of a multipart upload: 5 MiB is S3's smallest; few at once bound what one upload keeps in memory.
_PART = 5 * 2**20
_PARTS_AT_ONCE = 2


class ObjectStorage:
    """Objects in a bucket, below the URL's prefix."""

    def __init__(self, store: Any) -> None:
        self._store = store

    @classmethod
    def from_url(cls, url: str) -> ObjectStorage:
        """From `s3://bucket/prefix` and its kin."""
        return cls(from_url(url))

    def put_bytes(self, key: str, data: bytes, content_type: str = OCTETS) -> None:
        with _store_errors():
            obstore.put(self._store, check_key(key), data, attributes={"Content-Type": content_type})

    def put_file(self, key: str, path: Path, content_type: str = OCTETS) -> None:
        with _store_errors():
            obstore.put(
                self._store,
                check_key(key),
                path,
                attributes={"Content-Type": content_type},
                chunk_size=_PART,
                max_concurrency=_PARTS_AT_ONCE,
            )

    @asynccontextmanager
    async def put_stream(self, key: str, content_type: str = OCTETS) -> AsyncIterator[Writer]:
        writer = _QueueWriter()
        upload = asyncio.ensure_future(
            obstore.put_async(
                self._store,
                check_key(key),
                writer.pieces(),
                attributes={"Content-Type": content_type},
                chunk_size=_PART,
                max_concurrency=_PARTS_AT_ONCE,
            )
        )
        writer.task = upload
        with _store_errors():
            try:
                yield writer
            except BaseException:
                await writer.close(failed=True)  # the source raises inside obstore, which aborts the multipart upload
                await asyncio.gather(upload, return_exceptions=True)
                raise
            await writer.close()
            await upload

    def get_range(self, key: str, start: int, end: int) -> bytes:
        return b"".join(self.stream(key, start, end))

    def stream(self, key: str, start: int = 0, end: int | None = None, chunk: int = CHUNK) -> Iterator[bytes]:
        with _store_errors():
            size = obstore.head(self._store, check_key(key))["size"]
            stop = size if end is None else min(end, size)
            if start < stop:
                found = obstore.get(self._store, key, options={"range": (start, stop)})
                for piece in found.stream(min_chunk_size=chunk):
                    yield bytes(piece)

    def get_file(self, key: str, path: Path) -> None:
        with path.open("wb") as file:
            file.writelines(self.stream(key))

    def head(self, key: str) -> Stored | None:
        try:
            with _store_errors():
                return Stored(key, obstore.head(self._store, check_key(key))["size"])
        except FileNotFoundError:
            return None

    def exists(self, key: str) -> bool:
        return self.head(key) is not None

    def delete(self, key: str) -> None:
        try:
            with _store_errors():
                obstore.delete(self._store, check_key(key))
        except FileNotFoundError:
            return  # some stores answer 404, others 204

    def delete_prefix(self, prefix: str, keep: Collection[str] = ()) -> None:
        kept = tuple(f"{check_key(one)}/" for one in keep)
        with _store_errors():
            for page in obstore.list(self._store, check_key(prefix)):
                found = [one["path"] for one in page]
                if gone := [path for path in found if not path.startswith(kept)]:
                    obstore.delete(self._store, gone)

    def names(self, prefix: str) -> Sequence[str]:
        with _store_errors():
            found = obstore.list_with_delimiter(self._store, check_key(prefix))
            return [path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"]]

    def local_path(self, key: str) -> Path | None:
        return None


@contextmanager
def _store_errors() -> Iterator[None]:
    """Obstore's errors as the interface has them. Their texts hold URLs: they stay the cause, for the log."""
    try:
        yield
    except FileNotFoundError:
        raise
    except BaseError as error:
        raise StorageUnavailable("the object store does not answer, or refuses") from error


class _Aborted(Exception):
    """Ends the source of an upload that must not complete."""


class _QueueWriter:
    """Turns writes into the async iterator that obstore reads. One piece waits at most: the sender is held up."""

    task: asyncio.Future[Any]

    def __init__(self) -> None:
        self._queue: asyncio.Queue[bytes | _Aborted | None] = asyncio.Queue(maxsize=1)

    async def write(self, data: bytes) -> None:
        await self._put(data)

    async def close(self, *, failed: bool = False) -> None:
        if not self.task.done():
            await self._put(_Aborted() if failed else None, closing=True)

    async def pieces(self) -> AsyncIterator[bytes]:
        while (item := await self._queue.get()) is not None:
            if isinstance(item, _Aborted):
                raise item
            yield item

    async def _put(self, item: bytes | _Aborted | None, *, closing: bool = False) -> None:
        # The store may fail while the queue is full: then nobody would ever read it again.
        put = asyncio.ensure_future(self._queue.put(item))
        await asyncio.wait({put, self.task}, return_when=asyncio.FIRST_COMPLETED)
        if not put.done():
            put.cancel()
        if self.task.done() and not closing:
            self.task.result()
            raise OSError("the upload ended before its source")
