"""The key that wraps job keys in the database: from the settings, else made once and kept in the data folder."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from app.settings import Settings

BYTES = 32


def load_secret_key(settings: Settings) -> bytes:
    """32 bytes, the same for API and workers. ValueError when what is set or stored is not 64 hexadecimal digits."""
    if settings.secret_key is not None:
        return _parse(settings.secret_key.get_secret_value(), "PRIVTUNE_SECRET_KEY")
    path = settings.data_dir / "secret_key"
    if not path.exists():
        _create(path)
    return _parse(path.read_text(), str(path))


def _create(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = _temporary(path, secrets.token_hex(BYTES))
    try:
        os.link(temporary, path)  # the first of two processes wins, and both read what it wrote
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def _temporary(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    return temporary


def _parse(text: str, source: str) -> bytes:
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        key = b""
    if len(key) != BYTES:
        raise ValueError(f"{source} must hold {2 * BYTES} hexadecimal digits.")
    return key
