"""Bytes under keys: one interface over a folder and over object stores. A scheme is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

from app.storage.interface import Storage, StorageUnavailable, Stored, Writer
from app.storage.local import LocalStorage
from app.storage.objects import ObjectStorage

__all__ = ["SCHEMES", "Storage", "StorageUnavailable", "Stored", "Writer", "open_storage"]

SCHEMES: dict[str, Callable[[str], Storage]] = {
    "file": LocalStorage.from_url,
    "s3": ObjectStorage.from_url,
    "gs": ObjectStorage.from_url,
    "az": ObjectStorage.from_url,
}


def open_storage(url: str) -> Storage:
    """The store at `file:///folder` or `s3://bucket/prefix`. ValueError on a scheme that is not in SCHEMES.

    Credentials and endpoints of object stores come from their usual variables (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL,
    AWS_ALLOW_HTTP, …).
    """
    scheme = urlsplit(url).scheme
    if scheme not in SCHEMES:
        raise ValueError(f"storage URL: the scheme must be one of {', '.join(SCHEMES)}")
    return SCHEMES[scheme](url)
