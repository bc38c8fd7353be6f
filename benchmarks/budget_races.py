"""Clients that race for the last of a budget: reserve, settle, release, each a transaction; the counts, and the sums.

    python -m benchmarks.budget_races [--clients 64] [--rounds 200] [--databases sqlite postgresql]

In each round a client reserves a plan, then has it charged whole or in part, gives it back, or keeps it until later. A
client that is told that its plan does not fit asks for exactly what is left, as far as it can see. After the race one
plan of exactly the rest's size is asked for, and then one of a single unit. Printed: what was admitted and refused, and
whether any of these broke: Σρ above the capacity after any entry of the ledger, a reservation that nobody holds, an
exactly fitting plan refused, one beyond it admitted, the ledger's chain, its sums against the reservations'.
"""

from __future__ import annotations

import argparse
import random  # noqa: TID251  # not private: which client does what
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from app.auth import service as auth
from app.budgets import audit, repository, service
from app.budgets.repository import Usage
from app.budgets.service import Charge
from app.budgets.tables import PrivacyBudget
from app.db.migrate import upgrade
from app.db.session import Database
from app.errors import BudgetExceeded
from app.privacy.filter import UNIT
from tests.postgres import Postgres

EVENT = {"type": "gaussian", "noise_multiplier": 1.0}


@dataclass
class Outcome:
    """What happened, over all clients."""

    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    highest: float = 0.0
    capacity: float = 0.0
    left_reserved: float = 0.0
    exact_fit_admitted: bool = False
    beyond_refused: bool = False
    intact: bool = False

    @property
    def sound(self) -> bool:
        """Whether the budget was a budget."""
        within = self.highest <= self.capacity
        return within and self.left_reserved == 0.0 and self.exact_fit_admitted and self.beyond_refused and self.intact


def race(url: str, clients: int, rounds: int, epsilon_limit: float = 3.0) -> Outcome:
    """Runs the clients on a fresh budget of a migrated database, through one pool of connections for every 32 of them,
    as through several API processes."""
    pools = [Database(url) for _ in range(0, clients, 32)]
    try:
        return _race(pools, clients, rounds, epsilon_limit)
    finally:
        for pool in pools:
            pool.dispose()


def _race(pools: list[Database], clients: int, rounds: int, epsilon_limit: float) -> Outcome:
    database = pools[0]
    with database.writing() as session:
        owner = auth.create_project(session, f"race-{time.time_ns()}").id
        budget_id = service.create(
            session, project_id=owner, name="race", epsilon_limit=epsilon_limit, delta=1e-6, actor="race"
        ).id
    outcome = Outcome()
    with database.reading() as session:
        outcome.capacity = session.get_one(PrivacyBudget, budget_id).rho_capacity
    start, guard = threading.Barrier(clients), threading.Lock()

    def client(me: int) -> None:
        database = pools[me % len(pools)]
        choose = random.Random(me)
        counts: Counter[str] = Counter()
        held: list[str] = []
        start.wait()
        for number in range(rounds):
            job_id = f"ftjob-{me}-{number}"
            # Large plans at first, so that the budget is nearly full all the time.
            rho = max(UNIT, round(outcome.capacity * choose.uniform(0.001, 0.2) / UNIT) * UNIT)
            if not _reserve(database, job_id, budget_id, rho):
                counts["refused"] += 1
                left = outcome.capacity - _usage(database, budget_id).total
                if left <= 0.0 or not _reserve(database, job_id, budget_id, left):
                    counts["refused again"] += 1
                    _give_back(database, held, counts)
                    continue
                rho = left
                counts["exact fits in the race"] += 1
            counts["admitted"] += 1
            # Most is given back, so that the race goes on to its end.
            match choose.randrange(10):
                case 0:
                    _settle(database, job_id, budget_id, max(UNIT, rho // (64 * UNIT) * UNIT))
                    counts["charged in part"] += 1
                case 1 if rho < outcome.capacity * 0.002:
                    _settle(database, job_id, budget_id, rho)
                    counts["charged whole"] += 1
                case 2 | 3:
                    held.append(job_id)
                case _:
                    _settle(database, job_id, budget_id, 0.0)
                    counts["given back"] += 1
        _give_back(database, held, counts)
        with guard:
            outcome.counts.update(counts)

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    outcome.seconds = time.perf_counter() - started

    after = _usage(database, budget_id)
    outcome.left_reserved = after.reserved
    rest = outcome.capacity - after.total
    outcome.exact_fit_admitted = rest == 0.0 or _reserve(database, "ftjob-exact", budget_id, rest)
    outcome.beyond_refused = not _reserve(database, "ftjob-beyond", budget_id, UNIT)
    with database.reading() as session:
        outcome.intact = audit.of(session, session.get_one(PrivacyBudget, budget_id)).intact
        points = repository.timeline(session, budget_id, after=0, limit=1_000_000)
    outcome.highest = max(point.charged + point.reserved for point in points)
    return outcome


def _reserve(database: Database, job_id: str, budget_id: str, rho: float) -> bool:
    try:
        with database.writing() as session:
            service.reserve(session, job_id, [Charge(budget_id, EVENT, rho)], actor="race")
    except BudgetExceeded:
        return False
    return True


def _settle(database: Database, job_id: str, budget_id: str, rho: float) -> None:
    with database.writing() as session:
        service.settle(session, job_id, {budget_id: (EVENT, rho)} if rho else {}, actor="race")


def _give_back(database: Database, held: list[str], counts: Counter[str]) -> None:
    while held:
        _settle(database, held.pop(), "", 0.0)
        counts["given back"] += 1


def _usage(database: Database, budget_id: str) -> Usage:
    with database.reading() as session:
        return service.usage(session, budget_id)


@contextmanager
def _database(kind: str, folder: str) -> Iterator[str]:
    if kind == "sqlite":
        yield f"sqlite:///{Path(folder) / 'race.db'}"
    else:
        with Postgres.start() as server:
            yield server.create("race")


def main() -> None:
    """Prints one block a database."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--clients", type=int, default=64)
    options.add_argument("--rounds", type=int, default=200)
    options.add_argument("--databases", nargs="+", choices=("sqlite", "postgresql"), default=["sqlite", "postgresql"])
    chosen = options.parse_args()
    for kind in chosen.databases:
        with tempfile.TemporaryDirectory(prefix="pt-race-") as folder, _database(kind, folder) as url:
            upgrade(url)
            outcome = race(url, chosen.clients, chosen.rounds)
        print(f"{kind}: {chosen.clients} clients x {chosen.rounds} rounds in {outcome.seconds:.1f} s")
        for name, count in sorted(outcome.counts.items()):
            print(f"  {name:24} {count}")
        print(f"  highest sum / capacity   {outcome.highest / outcome.capacity:.12f}")
        print(f"  left reserved            {outcome.left_reserved:g}")
        print(
            f"  exact fit admitted       {outcome.exact_fit_admitted}; one unit more refused: {outcome.beyond_refused}"
        )
        print(f"  chain and sums intact    {outcome.intact}")
        if not outcome.sound:
            raise SystemExit("NOT SOUND")


if __name__ == "__main__":
    main()
