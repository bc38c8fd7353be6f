"""A project and budgets without the rest of the application."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app.auth import service as auth
from app.budgets import service
from app.budgets.service import Charge
from app.db.session import Database
from app.privacy.dp_events import event_for, to_json
from app.privacy.filter import UNIT, RenyiBudget
from app.privacy.plan import SampledGaussian
from tests.app.jobs.conftest import caller as caller
from tests.app.jobs.conftest import make_file as make_file


@pytest.fixture
def owner(database: Database) -> str:
    """A project's id."""
    with database.writing() as session:
        return auth.create_project(session, "owner").id


@pytest.fixture
def make_budget(database: Database, owner: str) -> Callable[..., str]:
    """A budget's id: `make_budget(epsilon_limit=3.0)`."""

    def make(epsilon_limit: float = 10.0, delta: float = 1e-6) -> str:
        with database.writing() as session:
            return service.create(
                session, project_id=owner, name="patients", epsilon_limit=epsilon_limit, delta=delta, actor="test"
            ).id

    return make


def real_charge(budget_id: str, accounting: RenyiBudget, noise_multiplier: float, num_steps: int = 100) -> Charge:
    """What a plan of DP-SGD costs."""
    part = SampledGaussian("main", 0.1, num_steps, noise_multiplier, 1.0, "flat")
    event = event_for([part])
    return Charge(budget_id, to_json(event), accounting.rho_of(event))


def plain_charge(budget_id: str, rho: float) -> Charge:
    """A charge of a given ρ, rounded to whole units: for the arithmetic of admission, which never looks at events."""
    return Charge(budget_id, {"type": "gaussian", "noise_multiplier": 1.0}, round(rho / UNIT) * UNIT)


@pytest.fixture
def watched(app: FastAPI) -> Database:
    """The application's own database, whose commits are followed by the ledgers' heads."""
    opened: Database = app.state.database
    return opened


@pytest.fixture
def budget_id(client: TestClient) -> str:
    """The default project's own budget: ε = 10 at δ = 1e-6."""
    (budget,) = client.get("/v1/privacy_budgets").json()["data"]
    assert budget["is_default"]
    identifier: str = budget["id"]
    return identifier
