"""The revisions and the tables of the code describe the same database."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import CheckConstraint, inspect

from app.db.migrate import config, upgrade
from app.db.session import Database
from app.metadata import metadata


@pytest.mark.every_database
def test_revisions_make_the_tables_of_the_code(database: Database) -> None:
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


@pytest.mark.every_database
def test_check_constraints_are_those_of_the_code(database: Database) -> None:
    """Alembic does not compare them."""
    found = inspect(database.engine)
    for table in metadata.sorted_tables:
        expected = {c.name: str(c.sqltext) for c in table.constraints if isinstance(c, CheckConstraint)}
        there = {c["name"]: c["sqltext"] for c in found.get_check_constraints(table.name)}
        assert there.keys() == expected.keys(), table.name
        if database.engine.dialect.name == "sqlite":  # PostgreSQL writes them in its own words
            assert there == expected, table.name


@pytest.mark.every_database
def test_revisions_can_be_taken_back(database: Database, database_url: str) -> None:
    command.downgrade(config(database_url), "base")
    assert set(inspect(database.engine).get_table_names()) == {"alembic_version"}
    upgrade(database_url)
    assert "jobs" in inspect(database.engine).get_table_names()


@pytest.mark.every_database
def test_two_starters_at_once_migrate_once(database: Database, database_url: str) -> None:
    command.downgrade(config(database_url), "base")
    start = [sys.executable, "-c", "import sys; from app.db.migrate import upgrade; upgrade(sys.argv[1])", database_url]
    starters = [subprocess.Popen(start) for _ in range(3)]
    assert [starter.wait(60) for starter in starters] == [0, 0, 0]


def test_a_percent_sign_in_the_url_is_kept(tmp_path: Path) -> None:
    upgrade(f"sqlite:///{tmp_path}/deep/100%.db")
    assert (tmp_path / "deep" / "100%.db").exists()
