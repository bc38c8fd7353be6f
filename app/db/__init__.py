"""The database: the declarative base, and sessions that are one unit of work each."""
