"""Ed25519 signatures of privacy reports: the server's key, signing, and what an auditor checks.

The key follows from the secret key that API and workers share, unless the settings name one. So do the commitments to
private rows: their plain digest would let whoever knows all rows but one test a guess for the last.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from app.privacy.report_format import SIGNED, signed_bytes

if TYPE_CHECKING:  # an auditor's machine has no pydantic
    from app.settings import Settings

ALGORITHM = "Ed25519"

_BYTES = 32


@dataclass(frozen=True, slots=True)
class ReportKeys:
    """What a report is signed with, and what its commitments to rows are keyed with."""

    signing: Ed25519PrivateKey = field(repr=False)
    commitment: bytes = field(repr=False)

    @property
    def public_key(self) -> str:
        """In hexadecimal: for whoever checks signatures."""
        return self.signing.public_key().public_bytes_raw().hex()

    def sign(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """The report with its signature."""
        header = {"algorithm": ALGORITHM, "signed": SIGNED, "public_key": self.public_key}
        unsigned = {**report, "signature": header}
        value = self.signing.sign(signed_bytes(unsigned)).hex()
        return {**report, "signature": {**header, "value": value}}

    def commit(self, rows_digest: str | None) -> str | None:
        """Binds the report to rows by their digest, without showing it."""
        return rows_digest and hmac.new(self.commitment, rows_digest.encode(), hashlib.sha256).hexdigest()


def load_report_keys(settings: Settings, secret_key: bytes) -> ReportKeys:
    """The same for API and workers. ValueError when PRIVTUNE_SIGNING_KEY is set, but is not 64 hexadecimal digits."""
    seed = _derived(secret_key, b"privtune report signing")
    if settings.signing_key is not None:
        seed = _from_hex(settings.signing_key.get_secret_value(), "PRIVTUNE_SIGNING_KEY")
    return ReportKeys(Ed25519PrivateKey.from_private_bytes(seed), _derived(secret_key, b"privtune data commitment"))


def public_key_of(text: str) -> str:
    """A public key given as 64 hexadecimal digits or as PEM, in hexadecimal. Raises ValueError."""
    if "BEGIN PUBLIC KEY" not in text:
        return _from_hex(text, "A public key").hex()
    key = load_pem_public_key(text.strip().encode())
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("The PEM is no Ed25519 key.")
    return key.public_bytes_raw().hex()


def check_signature(report: Mapping[str, Any], public_key: str | None = None) -> None:
    """Raises ValueError where the report's signature is not by `public_key`, or, without one, by the key that it names.

    The latter shows only that nothing was changed since somebody signed.
    """
    try:
        signature = report["signature"]
        if not isinstance(signature, dict) or signature.keys() != {"algorithm", "signed", "public_key", "value"}:
            raise ValueError("the signature is not of the report's form")
        if (signature["algorithm"], signature["signed"]) != (ALGORITHM, SIGNED):
            raise ValueError("signed in an unknown way")
        if public_key is not None and signature["public_key"] != public_key:
            raise ValueError("signed by another key than the one expected")
        key, value = signature["public_key"], signature["value"]
        if not (re.fullmatch("[0-9a-f]{64}", key) and re.fullmatch("[0-9a-f]{128}", value)):
            raise ValueError("a key is 64 hexadecimal digits, a signature 128")
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(value), signed_bytes(report))
    except (KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("there is no signature of the report's form") from None
    except InvalidSignature:
        raise ValueError("the signature does not fit: something was changed after it was signed") from None


def _derived(secret_key: bytes, purpose: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=_BYTES, salt=None, info=purpose).derive(secret_key)


def _from_hex(text: str, what: str) -> bytes:
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        key = b""
    if len(key) != _BYTES:
        raise ValueError(f"{what} must be {2 * _BYTES} hexadecimal digits.")
    return key
