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


@pytest.mark.parametrize(
    "program",
    [
        "from app import serve; serve.serve(None, '', 0)",
        "from worker import __main__; __main__.main()",
        "from worker import main; main.main('training')",
        "from app.files import reader; reader.main({})",
    ],
    ids=["serve", "worker", "one-queue", "reader"],
)
def test_each_program_with_credentials_or_rows_does_so_first(program: str) -> None:
    """Before anything else: what it is given here would stop it at once. (The trainer: tests/trainer/test_sandbox.)"""
    stop = "import sys; sys.argv = ['x']; from app import tether; tether.become_unreadable = lambda: sys.exit(7); "
    done = subprocess.run([sys.executable, "-c", stop + program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 7, done.stderr


def test_whichever_command_makes_the_data_folder_it_is_private(tmp_path: Path) -> None:
    by_key, by_migration = Settings(data_dir=tmp_path / "key"), Settings(data_dir=tmp_path / "migration")
    load_secret_key(by_key)
    migrate.upgrade(by_migration.database)
    modes = [stat.S_IMODE(settings.data_dir.stat().st_mode) for settings in (by_key, by_migration)]
    assert modes == [0o700, 0o700]
