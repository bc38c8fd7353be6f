"""The first start sets a database up, once; the secret key is made once and read by all."""

from __future__ import annotations

import stat
import threading
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import func, select

from app.auth import service as auth
from app.auth.tables import ApiKey, Project
from app.bootstrap import bootstrap
from app.budgets import service as budgets
from app.db.session import Database
from app.errors import InvalidRequest
from app.secret_key import load_secret_key
from app.settings import Settings


@pytest.mark.every_database
def test_the_first_start_makes_project_budget_and_admin_key(database: Database, settings: Settings) -> None:
    with database.writing() as session:
        token = bootstrap(session, settings)
    assert token is not None
    with database.reading() as session:
        caller = auth.authenticate(session, token)
        assert caller.may("admin")
        budget = budgets.default_for(session, caller.project_id)
        assert (budget.epsilon_limit, budget.delta) == (settings.budget_epsilon, settings.budget_delta)


def test_the_second_start_makes_nothing(database: Database, settings: Settings) -> None:
    with database.writing() as session:
        bootstrap(session, settings)
    with database.writing() as session:
        assert bootstrap(session, settings) is None
        for table in (Project, ApiKey):
            assert session.scalar(select(func.count()).select_from(table)) == 1


def test_the_operator_may_set_the_key(database: Database, settings: Settings) -> None:
    chosen = settings.model_copy(update={"api_key": SecretStr("an-operators-own-key-0123")})
    with database.writing() as session:
        assert bootstrap(session, chosen) == "an-operators-own-key-0123"
    with database.reading() as session:
        assert auth.authenticate(session, "an-operators-own-key-0123").may("admin")


def test_a_weak_key_sets_nothing_up(database: Database, settings: Settings) -> None:
    def start() -> None:
        with database.writing() as session:
            bootstrap(session, settings.model_copy(update={"api_key": SecretStr("1234")}))

    with pytest.raises(InvalidRequest, match="at least 20"):
        start()
    with database.reading() as session:
        assert not auth.is_set_up(session)


def test_the_secret_key_is_made_once_and_kept_private(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    found: list[bytes] = []
    starters = [threading.Thread(target=lambda: found.append(load_secret_key(settings))) for _ in range(8)]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join()
    assert len(set(found)) == 1
    assert len(found) == 8
    assert len(found[0]) == 32
    files = list((tmp_path / "data").iterdir())
    assert [file.name for file in files] == ["secret_key"]
    assert stat.S_IMODE(files[0].stat().st_mode) == 0o600


def test_the_secret_key_may_be_set_and_must_be_whole(tmp_path: Path) -> None:
    given = Settings(data_dir=tmp_path, secret_key=SecretStr("0f" * 32))
    assert load_secret_key(given) == b"\x0f" * 32
    assert list(tmp_path.iterdir()) == []
    for wrong in ("0f" * 31, "x" * 64, ""):
        with pytest.raises(ValueError, match="64 hexadecimal") as caught:
            load_secret_key(Settings(data_dir=tmp_path, secret_key=SecretStr(wrong)))
        assert not wrong or wrong not in str(caught.value)
