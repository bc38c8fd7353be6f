"""API tokens: `pt-`, 22 random letters and digits, 6 of checksum, so that a secret scanner (and a typo) can be told."""

from __future__ import annotations

import hashlib
import secrets
import string
import zlib

PREFIX = "pt-"
SHOWN = 8
"""How many characters of a token are kept to recognise it by."""

_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
_RANDOM = 22
_CHECKSUM = 6


def new_token() -> str:
    """A fresh token with 130 bits of the operating system's entropy."""
    body = "".join(secrets.choice(_ALPHABET) for _ in range(_RANDOM))
    return PREFIX + body + _checksum(body)


def is_well_formed(token: str) -> bool:
    """Whether a token that claims to be one of ours (by its prefix) has its length and checksum.

    A token without the prefix was chosen by the operator, and has no form to check.
    """
    if not token.startswith(PREFIX):
        return True
    body, checksum = token[len(PREFIX) : -_CHECKSUM], token[-_CHECKSUM:]
    return len(body) == _RANDOM and secrets.compare_digest(checksum.encode(), _checksum(body).encode())


def digest(token: str) -> str:
    """What is stored of a token: SHA-256, hexadecimal."""
    return hashlib.sha256(token.encode()).hexdigest()


def _checksum(body: str) -> str:
    number = zlib.crc32(body.encode())
    letters = []
    for _ in range(_CHECKSUM):
        number, rest = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[rest])
    return "".join(reversed(letters))
