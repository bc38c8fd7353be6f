"""Alembic's entry: runs revisions on the database of `app.db.migrate.config`."""

from __future__ import annotations

from pathlib import Path

from alembic import context
from sqlalchemy import Connection, create_engine, pool, text
from sqlalchemy.engine import make_url

from app.metadata import metadata

#: Any number, as long as nothing else in this database locks it: "privtune" in ASCII, cut to 63 bits.
_LOCK = int.from_bytes(b"privtune") >> 1


def run() -> None:
    """Revisions run one starter at a time, all or none."""
    url = make_url(context.config.attributes["url"])
    if url.get_backend_name() == "sqlite" and url.database:
        Path(url.database).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    engine = create_engine(url, poolclass=pool.NullPool)
    with engine.connect() as connection:
        _lock(connection)
        context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
        with context.begin_transaction():
            context.run_migrations()
        connection.commit()


def _lock(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _LOCK})
    else:
        raw = connection.connection.driver_connection
        raw.isolation_level = None  # the driver would commit before each CREATE TABLE
        raw.execute("PRAGMA busy_timeout = 60000")
        connection.exec_driver_sql("BEGIN IMMEDIATE")


run()
