"""The right to work on a row, for a time, under a fence that rises with each claim."""

from __future__ import annotations


class LeaseLost(Exception):
    """The row is no longer this worker's: it stops, writes nothing, and deletes what it has."""
