"""What planning reads: values, so that it needs no database and holds no lock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.budgets.repository import Usage
from app.privacy.filter import RenyiBudget


@dataclass(frozen=True, slots=True)
class BudgetFacts:
    """A budget as it was when planning began; admission looks again, under the lock."""

    id: str
    accounting: RenyiBudget
    usage: Usage
    open: bool
    unit_column: str | None = None
    policy: Mapping[str, float | None] | None = None


@dataclass(frozen=True, slots=True)
class FileFacts:
    """A processed file. param: the request's key that named it. budget: None for a file declared public.

    unit_column, num_units: its privacy units, by default each row. Of persons, num_rows is private: nothing that is
    told, or that a plan holds, may follow from it.

    label_lists: as `app.files.tables.File` has them.
    columns: [{name, distinct, classes, nulls, …}] as `app.files.tables.File` has them. They come from private rows:
    they decide whether a job can be, and none of their values is ever told.
    """

    id: str
    param: str
    num_rows: int
    rows_digest: str
    columns: tuple[Mapping[str, Any], ...]
    budget: BudgetFacts | None
    unit_column: str | None = None
    num_units: int | None = None
    label_lists: tuple[str, ...] = ()

    @property
    def units(self) -> int:
        """Privacy units in it, public by declaration."""
        return self.num_rows if self.num_units is None else self.num_units

    @property
    def public(self) -> bool:
        """Declared public by an admin."""
        return self.budget is None

    def column(self, name: str) -> Mapping[str, Any] | None:
        """The column of that name."""
        return next((column for column in self.columns if column["name"] == name), None)


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a job gets that names no target."""

    epsilon: float
    delta: float
