"""Revisions of the database, run by `app.db.migrate` (`privtune migrate`).

A new one is written by comparing the tables with a database that is up to date, then read and corrected by hand:

    from alembic import command
    from app.db.migrate import config, upgrade
    upgrade("sqlite:///scratch.db")
    command.revision(config("sqlite:///scratch.db"), "What changes", autogenerate=True, rev_id="0002")
"""
