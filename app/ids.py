"""Identifiers: a prefix that names the kind, and a UUIDv7 (RFC 9562) in lower-case base 32: ids sort by time."""

from __future__ import annotations

from typing import Literal

import uuid_utils

Prefix = Literal["file", "upload", "ftjob", "ftevent", "ftckpt", "pb", "key", "proj", "res", "entry", "export", "part"]

#: Crockford's base 32: digits sort before letters, so the text sorts as the number does.
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_DIGITS = 26  # ceil(128 bits / 5)


def new_id(prefix: Prefix) -> str:
    """A fresh id, such as `ftjob-01k3…`."""
    return f"{prefix}-{sortable_token()}"


def made_at(identifier: str) -> float:
    """When an id of `new_id` was made, in Unix seconds. Raises ValueError for anything else."""
    _, _, token = identifier.partition("-")
    if len(token) != _DIGITS:
        raise ValueError("not an id")
    number = 0
    for character in token:
        number = number << 5 | _ALPHABET.index(character)
    return (number >> 80) / 1000  # the first 48 of 128 bits


def sortable_token() -> str:
    """26 characters of [0-9a-z] that sort by creation time."""
    number = uuid_utils.uuid7().int
    return "".join(_ALPHABET[(number >> shift) & 31] for shift in range(5 * (_DIGITS - 1), -1, -5))
