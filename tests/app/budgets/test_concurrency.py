"""Races for the last of a budget, with real threads on real databases."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.budgets import owner, service
from app.budgets.service import Charge
from app.budgets.tables import PrivacyBudget
from app.db.session import Database
from app.errors import BudgetExceeded
from benchmarks.budget_races import race
from tests.app.budgets.conftest import plain_charge
from tests.app.budgets.test_service import broken, chain, used

THREADS = 8
ROUNDS = 12


@pytest.mark.every_database
def test_exactly_one_of_many_takes_the_last_of_a_budget(database: Database, make_budget: Callable[..., str]):
    """Check-then-insert over-spends in nearly every round of this; the row lock in none."""
    with ThreadPoolExecutor(THREADS) as pool:
        for number in range(ROUNDS):
            budget_id = make_budget()
            with database.reading() as session:
                capacity = session.get_one(PrivacyBudget, budget_id).rho_capacity
            most = plain_charge(budget_id, capacity * 0.8)
            with database.writing() as session:
                service.reserve(session, f"ftjob-{number}", [most], actor="test")
            last = Charge(budget_id, most.dp_event, capacity - most.rho)
            start = threading.Barrier(THREADS)

            def race(me: int, last: Charge = last, start: threading.Barrier = start, number: int = number) -> bool:
                start.wait()
                try:
                    with database.writing() as session:
                        service.reserve(session, f"ftjob-{number}-{me}", [last], actor="test")
                except BudgetExceeded:
                    return False
                return True

            assert sum(pool.map(race, range(THREADS))) == 1
            assert used(database, budget_id).total == capacity
            assert broken(database, budget_id) is None


@pytest.mark.every_database
def test_plans_over_two_budgets_do_not_wait_for_each_other_for_ever(
    database: Database, make_budget: Callable[..., str]
):
    """Half of the threads name the budgets in the other order; settlements run between."""
    one, two = make_budget(), make_budget()
    start = threading.Barrier(THREADS)

    def work(me: int) -> None:
        start.wait()
        for number in range(6):
            charges = [plain_charge(one, 0.01), plain_charge(two, 0.01)]
            job_id = f"ftjob-{me}-{number}"
            with database.writing() as session:
                service.reserve(session, job_id, charges if me % 2 else charges[::-1], actor="test")
            with database.writing() as session:
                service.settle(session, job_id, {} if number % 2 else None, actor="test")

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))
    for budget_id in (one, two):
        assert used(database, budget_id).reserved == 0.0
        assert used(database, budget_id).charged == THREADS * 3 * plain_charge(one, 0.01).rho
        assert broken(database, budget_id) is None
        assert len(chain(database, budget_id)) == 1 + THREADS * 6 * 2


@pytest.mark.every_database
def test_a_job_that_ends_while_its_budget_is_reconciled_gives_nothing_back(
    database: Database, make_budget: Callable[..., str]
):
    """The cancel has seen its reservation, and waits for the budget; the reconciliation charges that in full first."""
    budget_id = make_budget()
    charge = plain_charge(budget_id, 0.5)
    with database.writing() as session:
        service.reserve(session, "ftjob-1", [charge], actor="test")
        evidence = {"sequence": 9, "hash": "f" * 64, "rho": charge.rho, "object_sha256": "0" * 64}
        owner.lock_for(session, budget_id, evidence)

    def cancel() -> None:
        executed = {budget_id: (charge.dp_event, charge.rho / 2)}
        with database.writing() as session:
            service.settle(session, "ftjob-1", executed, actor="test")

    with ThreadPoolExecutor(1) as pool:
        with database.writing() as session:
            budget = service.lock(session, budget_id)
            cancelled = pool.submit(cancel)
            time.sleep(0.5)
            owner.reconcile(session, budget, None, None, "test", store=None)
        cancelled.result()
    assert used(database, budget_id).charged == charge.rho
    assert [entry.kind for entry in chain(database, budget_id)][-2:] == ["charged", "reconciled"]
    assert broken(database, budget_id) is None


@pytest.mark.every_database
def test_clients_that_reserve_settle_and_release_leave_a_sound_budget(database_url: str):
    """The benchmark's race, smaller: no overspend at any look, an exact fit admitted, no reservation left behind."""
    outcome = race(database_url, clients=16, rounds=10)
    assert outcome.highest <= outcome.capacity
    assert outcome.left_reserved == 0.0
    assert outcome.exact_fit_admitted
    assert outcome.beyond_refused
    assert outcome.intact
    assert outcome.counts["refused"] > 0
    assert outcome.counts["admitted"] > 16
