"""Brings a database to the newest revision."""

from __future__ import annotations

from importlib import resources

from alembic import command
from alembic.config import Config


def config(url: str) -> Config:
    """Alembic's configuration for this database; nothing is read from a file."""
    made = Config()
    made.set_main_option("script_location", str(resources.files("migrations")))
    made.attributes["url"] = url  # not an option: a `%` in a password would be read as an interpolation
    return made


def upgrade(url: str) -> None:
    """Runs what is missing, in one transaction; several hosts may start at once. SQLite's folder is made."""
    command.upgrade(config(url), "head")
