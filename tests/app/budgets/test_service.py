"""Admission and settlement of single jobs, and the ledger that they leave."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import select

from app.budgets import ledger, repository, service
from app.budgets.service import Charge
from app.budgets.tables import LedgerEntry, PrivacyBudget
from app.db.session import Database
from app.errors import BudgetExceeded, InvalidRequest, NotFound
from app.privacy.accountants import pld_epsilon
from app.privacy.dp_events import event_for, to_json
from app.privacy.plan import SampledGaussian
from tests.app.budgets.conftest import plain_charge, real_charge

MakeBudget = Callable[..., str]


def chain(database: Database, budget_id: str) -> list[LedgerEntry]:
    with database.reading() as session:
        return list(session.scalars(repository.entries(budget_id).order_by(LedgerEntry.sequence)))


def broken(database: Database, budget_id: str) -> int | None:
    entries = chain(database, budget_id)
    with database.reading() as session:
        return ledger.first_broken(entries, session.get_one(PrivacyBudget, budget_id))


def used(database: Database, budget_id: str) -> repository.Usage:
    with database.reading() as session:
        return service.usage(session, budget_id)


def reserve(database: Database, job_id: str, *charges: Charge) -> None:
    with database.writing() as session:
        service.reserve(session, job_id, charges, actor="key")


def settle(database: Database, job_id: str, charged: dict | None) -> None:
    with database.writing() as session:
        service.settle(session, job_id, charged, actor="worker")


@pytest.mark.every_database
def test_a_plan_is_reserved_whole_then_charged_for_what_was_executed(database: Database, make_budget: MakeBudget):
    budget_id = make_budget()
    with database.reading() as session:
        accounting = service.accounting_of(session.get_one(PrivacyBudget, budget_id))
    whole = real_charge(budget_id, accounting, 2.0, num_steps=100)
    part = real_charge(budget_id, accounting, 2.0, num_steps=30)
    assert 0.0 < part.rho < whole.rho

    reserve(database, "ftjob-1", whole)
    assert used(database, budget_id) == repository.Usage(charged=0.0, reserved=whole.rho)
    settle(database, "ftjob-1", {budget_id: (part.dp_event, part.rho)})
    assert used(database, budget_id) == repository.Usage(charged=part.rho, reserved=0.0)

    entries = chain(database, budget_id)
    assert [entry.kind for entry in entries] == ["opened", "reserved", "charged", "released"]
    assert [entry.rho for entry in entries] == [0.0, whole.rho, part.rho, whole.rho - part.rho]
    assert entries[2].dp_event == part.dp_event
    assert broken(database, budget_id) is None


def test_settling_twice_changes_nothing(database: Database, make_budget: MakeBudget):
    budget_id = make_budget()
    charge = plain_charge(budget_id, 0.5)
    reserve(database, "ftjob-1", charge)
    settle(database, "ftjob-1", None)
    before = len(chain(database, budget_id))
    settle(database, "ftjob-1", {})
    assert used(database, budget_id).charged == charge.rho
    assert len(chain(database, budget_id)) == before


def test_a_job_of_which_nothing_was_executed_gives_everything_back(database: Database, make_budget: MakeBudget):
    budget_id = make_budget()
    reserve(database, "ftjob-1", plain_charge(budget_id, 0.5))
    settle(database, "ftjob-1", {})
    assert used(database, budget_id).total == 0.0
    assert [entry.kind for entry in chain(database, budget_id)] == ["opened", "reserved", "released"]


def test_an_exactly_fitting_plan_is_admitted_and_then_nothing_is(database: Database, make_budget: MakeBudget):
    budget_id = make_budget()
    with database.reading() as session:
        capacity = session.get_one(PrivacyBudget, budget_id).rho_capacity
    first = plain_charge(budget_id, capacity / 3)
    reserve(database, "ftjob-1", first)
    reserve(database, "ftjob-2", Charge(budget_id, first.dp_event, capacity - first.rho))
    with pytest.raises(BudgetExceeded) as refused:
        reserve(database, "ftjob-3", plain_charge(budget_id, 2.0**-40))
    assert refused.value.code == "budget_exceeded"
    assert used(database, budget_id).total == capacity


def test_two_budgets_are_taken_together_or_not_at_all(database: Database, make_budget: MakeBudget):
    small, large = make_budget(epsilon_limit=1.0), make_budget(epsilon_limit=10.0)
    with pytest.raises(BudgetExceeded):
        reserve(database, "ftjob-1", plain_charge(large, 1.0), plain_charge(small, 4.0))
    assert used(database, large).total == used(database, small).total == 0.0
    reserve(database, "ftjob-2", plain_charge(large, 1.0), plain_charge(small, 0.05))
    settle(database, "ftjob-2", {large: ({"type": "gaussian", "noise_multiplier": 1.0}, 0.5)})
    assert (used(database, large).charged, used(database, small).charged) == (0.5, 0.0)
    assert broken(database, large) is broken(database, small) is None


def test_a_first_plan_may_be_admitted_by_pld_alone_and_closes_its_budget(database: Database, make_budget: MakeBudget):
    """Row 32 of the failure table: after such a plan nothing adaptive may follow."""
    budget_id = make_budget(epsilon_limit=3.0)
    with database.reading() as session:
        accounting = service.accounting_of(session.get_one(PrivacyBudget, budget_id))
    event = event_for([SampledGaussian("main", 0.125, 160, 2.67, 1.0, "automatic")])
    epsilon = pld_epsilon(event, 1e-6).epsilon
    rho = accounting.rho_of(event)
    assert epsilon <= 3.0
    assert not accounting.admits(0.0, rho)
    with pytest.raises(BudgetExceeded):
        reserve(database, "ftjob-0", Charge(budget_id, to_json(event), rho))  # without its PLD: by the filter only
    with pytest.raises(BudgetExceeded):
        reserve(database, "ftjob-0", Charge(budget_id, to_json(event), rho, first_plan_epsilon=3.01))

    reserve(database, "ftjob-1", Charge(budget_id, to_json(event), rho, first_plan_epsilon=epsilon))
    with pytest.raises(BudgetExceeded):
        reserve(database, "ftjob-2", plain_charge(budget_id, 0.001))
    settle(database, "ftjob-1", {})  # nothing was executed: as if it had never been
    reserve(database, "ftjob-3", Charge(budget_id, to_json(event), rho, first_plan_epsilon=epsilon))
    settle(database, "ftjob-3", {budget_id: ({"type": "gaussian", "noise_multiplier": 50.0}, 0.001953125)})
    with pytest.raises(BudgetExceeded) as refused:  # though almost nothing was charged
        reserve(database, "ftjob-4", plain_charge(budget_id, 0.001))
    assert refused.value.code == "budget_closed"
    assert chain(database, budget_id)[-1].kind == "closed"


def test_by_pld_alone_only_the_first_plan_is_admitted(database: Database, make_budget: MakeBudget):
    budget_id = make_budget(epsilon_limit=3.0)
    reserve(database, "ftjob-1", plain_charge(budget_id, 0.01))
    settle(database, "ftjob-1", None)
    with pytest.raises(BudgetExceeded):
        reserve(database, "ftjob-2", Charge(budget_id, {"type": "no_op"}, 1.9, first_plan_epsilon=2.9))


def test_more_than_was_reserved_is_never_charged(database: Database, make_budget: MakeBudget):
    budget_id = make_budget()
    reserve(database, "ftjob-1", plain_charge(budget_id, 0.5))
    with pytest.raises(ValueError, match="never exceeds"):
        settle(database, "ftjob-1", {budget_id: ({"type": "no_op"}, 0.75)})
    assert used(database, budget_id).reserved == 0.5


@pytest.mark.every_database
@pytest.mark.parametrize(
    ("column", "value"),
    [("rho", 0.25), ("kind", "released"), ("job_id", "ftjob-2"), ("actor", "nobody"), ("dp_event", {"type": "no_op"})],
)
def test_a_changed_entry_breaks_the_chain(database: Database, make_budget: MakeBudget, column: str, value: object):
    budget_id = make_budget()
    reserve(database, "ftjob-1", plain_charge(budget_id, 0.5))
    settle(database, "ftjob-1", None)
    assert broken(database, budget_id) is None
    with database.writing() as session:
        entry = session.scalars(
            select(LedgerEntry).where(LedgerEntry.budget_id == budget_id, LedgerEntry.sequence == 2)
        ).one()
        setattr(entry, column, value)
    assert broken(database, budget_id) == 2


def test_a_dropped_last_entry_breaks_the_chain(database: Database, make_budget: MakeBudget):
    budget_id = make_budget()
    reserve(database, "ftjob-1", plain_charge(budget_id, 0.5))
    with database.writing() as session:
        session.delete(
            session.scalars(
                select(LedgerEntry).where(LedgerEntry.budget_id == budget_id, LedgerEntry.sequence == 2)
            ).one()
        )
    assert broken(database, budget_id) == 2


def test_a_project_has_one_own_budget_and_sees_no_other(database: Database, owner: str, make_budget: MakeBudget):
    with database.writing() as session:
        own = service.create(
            session, project_id=owner, name="own", epsilon_limit=3.0, delta=1e-6, actor="test", is_default=True
        ).id
    other = make_budget()
    with database.reading() as session:
        assert service.default_for(session, owner).id == own
        assert service.get(session, owner, other).id == other
        with pytest.raises(NotFound):
            service.get(session, "proj-other", other)
        with pytest.raises(NotFound):
            service.default_for(session, "proj-other")


@pytest.mark.parametrize(("limit", "delta"), [(0.0, 1e-6), (-1.0, 1e-6), (1e9, 1e-6), (3.0, 1e-30), (3.0, 1.0)])
def test_a_budget_that_promises_nothing_is_refused(database: Database, owner: str, limit: float, delta: float):
    with database.writing() as session, pytest.raises(InvalidRequest) as refused:
        service.create(session, project_id=owner, name="x", epsilon_limit=limit, delta=delta, actor="test")
    assert refused.value.code == "invalid_budget"
