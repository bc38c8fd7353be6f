"""Identifiers: a prefix that names the kind, and a UUIDv7 (RFC 9562) in lower-case base 32: ids sort by time."""

from __future__ import annotations

from typing import Literal

import uuid_utils

Prefix = Literal["file", "upload", "ftjob", "ftevent", "ftckpt", "pb", "key", "proj", "res", "entry", "export"]

#: Crockford's base 32: digits sort before letters, so the text sorts as the number does.
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_DIGITS = 26  # ceil(128 bits / 5)


def new_id(prefix: Prefix) -> str:
    """A fresh id, such as `ftjob-01k3…`."""
    return f"{prefix}-{sortable_token()}"


def sortable_token() -> str:
    """26 characters of [0-9a-z] that sort by creation time."""
    number = uuid_utils.uuid7().int
    return "".join(_ALPHABET[(number >> shift) & 31] for shift in range(5 * (_DIGITS - 1), -1, -5))
