"""Revisions of the database, run by `app.db.migrate` (`privtune migrate`)."""
