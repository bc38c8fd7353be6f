"""What a budget says of itself, against what its filter would do."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from app.budgets import service, status
from app.budgets.service import Charge
from app.budgets.status import remaining_epsilon
from app.budgets.tables import PrivacyBudget
from app.db.session import Database
from app.privacy.accountants import pld_epsilon
from app.privacy.calibration import gaussian_noise_multiplier
from app.privacy.dp_events import compose, event_for, from_json, to_json
from app.privacy.filter import RenyiBudget
from app.privacy.plan import GaussianRelease, SampledGaussian
from tests.app.budgets.test_service import reserve, settle


@pytest.mark.parametrize("limit", [1.0, 3.0, 8.0, 10.0])
@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.6, 0.95])
def test_what_remains_is_what_the_filter_still_admits(limit: float, fraction: float):
    budget = RenyiBudget.create(limit, 1e-6)
    used = budget.capacity * fraction
    remaining = remaining_epsilon(budget, used)
    assert 0.0 < remaining <= limit

    def admitted(epsilon: float) -> bool:
        release = GaussianRelease("one", gaussian_noise_multiplier(epsilon, 1e-6), 1.0)
        return budget.admits(used, budget.rho_of(event_for([release])))

    assert admitted(remaining * 0.999)
    assert remaining == limit or not admitted(remaining * 1.001)


def test_the_ends_of_what_remains():
    budget = RenyiBudget.create(3.0, 1e-6)
    assert remaining_epsilon(budget, 0.0) == 3.0
    assert remaining_epsilon(budget, budget.capacity) == 0.0
    assert remaining_epsilon(budget, budget.capacity * 2) == 0.0


def test_figures_of_a_budget_through_its_life(database: Database, make_budget: Callable[..., str]):
    budget_id = make_budget(epsilon_limit=10.0)

    def look() -> status.BudgetStatus:
        with database.reading() as session:
            state = status.read(session, session.get_one(PrivacyBudget, budget_id))
        return status.derive(state)

    with database.reading() as session:
        accounting = service.accounting_of(session.get_one(PrivacyBudget, budget_id))
    fresh = look()
    assert (fresh.spent.epsilon, fresh.reserved, fresh.remaining) == (0.0, 0.0, 10.0)

    def charge(noise_multiplier: float) -> Charge:
        event = event_for([SampledGaussian("main", 0.125, 160, noise_multiplier, 1.0, "automatic")])
        return Charge(budget_id, to_json(event), accounting.rho_of(event))

    first, second = charge(2.67), charge(3.5)
    sole = pld_epsilon(from_json(first.dp_event), 1e-6).epsilon
    reserve(database, "ftjob-1", first)
    waiting = look()
    assert waiting.spent.epsilon == 0.0
    assert waiting.reserved == sole  # one plan chosen by nobody's outputs: its PLD is a certificate
    settle(database, "ftjob-1", None)
    assert look().spent.epsilon == sole
    assert look().reserved == 0.0
    reserve(database, "ftjob-2", second)
    settle(database, "ftjob-2", None)
    two = look()
    together = pld_epsilon(compose([from_json(first.dp_event), from_json(second.dp_event)]), 1e-6).epsilon
    assert two.if_fixed_in_advance.epsilon == pytest.approx(together, rel=1e-3)
    # The second was chosen after the first: only the filter's conversion holds, and it stays below the limit.
    assert together < two.spent.epsilon <= 10.0
    assert two.spent.epsilon == accounting.epsilon_of(first.rho + second.rho)
    assert two.remaining < waiting.remaining < 10.0
