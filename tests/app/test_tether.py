"""What a child gives up, in a child, since it cannot be seen from within pytest without losing it there."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from app.db import migrate
from app.secret_key import load_secret_key
from app.settings import Settings

_GET_DUMPABLE = "import ctypes; from app import tether; {}; print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_DUMPABLE is Linux's")
def test_it_becomes_unreadable() -> None:
    def dumpable(statement: str) -> str:
        argv = [sys.executable, "-c", _GET_DUMPABLE.format(statement)]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()

    assert (dumpable("pass"), dumpable("tether.become_unreadable()")) == ("1", "0")


def test_whichever_command_makes_the_data_folder_it_is_private(tmp_path: Path) -> None:
    by_key, by_migration = Settings(data_dir=tmp_path / "key"), Settings(data_dir=tmp_path / "migration")
    load_secret_key(by_key)
    migrate.upgrade(by_migration.database)
    modes = [stat.S_IMODE(settings.data_dir.stat().st_mode) for settings in (by_key, by_migration)]
    assert modes == [0o700, 0o700]
