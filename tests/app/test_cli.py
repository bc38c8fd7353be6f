"""`privtune migrate` and `privtune keys`, as a person types them."""

from __future__ import annotations

from pathlib import Path

import pytest

from app import cli
from app.auth import service as auth
from app.db.session import Database
from app.errors import Unauthorized
from app.settings import Settings


@pytest.fixture
def folder(tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder. (`settings` clears the environment.)"""
    monkeypatch.setattr(cli, "configure", lambda level: None)  # logging is pytest's here
    return tmp_path / "cli"


def _run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert cli.main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def _scopes(folder: Path, token: str) -> frozenset[str]:
    database = Database(f"sqlite:///{folder}/privtune.db")
    try:
        with database.reading() as session:
            return auth.authenticate(session, token).scopes
    finally:
        database.dispose()


def test_the_life_of_a_key(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = _run(capsys, "migrate", "--data-dir", folder).split()[-1]
    assert "admin" in _scopes(folder, first)
    assert _run(capsys, "migrate", "--data-dir", folder) == ""

    token = _run(capsys, "keys", "create", "--name", "ward 7", "--scopes", "read", "--data-dir", folder).strip()
    assert _scopes(folder, token) == {"read"}

    listed = _run(capsys, "keys", "list", "--data-dir", folder)
    assert token not in listed
    assert first not in listed
    line = next(line for line in listed.splitlines() if line.endswith("ward 7"))
    assert token[:8] in line
    assert " active " in line

    key_id = line.split()[0]
    _run(capsys, "keys", "revoke", key_id, "--data-dir", folder)
    with pytest.raises(Unauthorized):
        _scopes(folder, token)
    assert " revoked " in _run(capsys, "keys", "list", "--data-dir", folder)


def test_a_mistake_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run(capsys, "migrate", "--data-dir", folder)
    for words in (
        ("keys", "revoke", "key-none"),
        ("keys", "create", "--scopes", "root"),
        ("keys", "create", "--project", "none"),
    ):
        assert cli.main([*words, "--data-dir", str(folder)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("privtune: ")
        assert error.count("\n") == 1


def test_a_generated_key_may_become_the_first(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    token = _run(capsys, "keys", "generate").strip()
    monkeypatch.setenv("PRIVTUNE_API_KEY", token)
    assert _run(capsys, "migrate", "--data-dir", folder) == "", "a key that the operator set is not printed"
    assert "admin" in _scopes(folder, token)
