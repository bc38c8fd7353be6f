"""What an owner sees of a budget over HTTP, and does with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event

from app.budgets import service
from app.budgets.service import Charge
from app.budgets.tables import LedgerEntry, PrivacyBudget, Reservation
from app.db.session import Database
from app.errors import BudgetExceeded
from app.privacy.accountants import interval_for, pld_epsilon, rdp_epsilon
from app.privacy.dp_events import compose, from_json
from app.privacy.filter import UNIT, RenyiBudget
from tests.app.budgets.conftest import plain_charge, real_charge
from tests.app.budgets.test_routes import BUDGET, key
from tests.app.budgets.test_service import reserve, settle
from tests.app.jobs.conftest import MODEL


def get(client: TestClient, budget_id: str, part: str = "", **params: Any) -> dict[str, Any]:
    answer = client.get(f"/v1/privacy_budgets/{budget_id}{part}", params=params)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def kinds(client: TestClient, budget_id: str) -> list[str]:
    return [entry["kind"] for entry in get(client, budget_id, "/entries", order="asc")["data"]]


def accounting(database: Database, budget_id: str) -> RenyiBudget:
    with database.reading() as session:
        return service.accounting_of(session.get_one(PrivacyBudget, budget_id))


def refused(answer: Any, code: str, status: int = 400) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    return error


# --- acts ------------------------------------------------------------------------------------------------------------


def test_raising_a_limit_is_an_act_of_an_admin_that_the_ledger_names(
    client: TestClient, watched: Database, budget_id: str, make_key: Callable[..., str]
):
    before = get(client, budget_id)
    charge = plain_charge(budget_id, before["rho_capacity"] * 1.2)
    with pytest.raises(BudgetExceeded):
        reserve(watched, "ftjob-1", charge)
    path = f"/v1/privacy_budgets/{budget_id}"
    refused(client.post(path, json={"epsilon_limit": 20}, headers=key(make_key("submit"))), "insufficient_scope", 403)

    after = client.post(path, json={"epsilon_limit": 20}).json()
    assert after["epsilon_limit"] == after["epsilon_remaining"] == 20.0
    assert (after["delta"], after["rdp_order"]) == (before["delta"], before["rdp_order"])
    assert after["rho_capacity"] > 1.9 * before["rho_capacity"]
    entry = get(client, budget_id, "/entries")["data"][0]
    assert entry["kind"] == "limit_raised"
    assert entry["actor"].startswith("key-")
    assert (entry["details"]["previous"], entry["details"]["epsilon_limit"]) == (10.0, 20.0)
    reserve(watched, "ftjob-1", charge)
    assert client.post(path, json={"epsilon_limit": 20}).json()["ledger_head"]["sequence"] == 3  # nothing was changed


def test_a_limit_is_never_below_what_is_spent_and_reserved(client: TestClient, watched: Database, budget_id: str):
    budget = accounting(watched, budget_id)
    first, second = (real_charge(budget_id, budget, 2.0, steps) for steps in (60, 30))
    reserve(watched, "ftjob-1", first)
    settle(watched, "ftjob-1", None)
    reserve(watched, "ftjob-2", second)
    committed = budget.epsilon_of(first.rho + second.rho)
    path = f"/v1/privacy_budgets/{budget_id}"
    # With the reservation it does not fit; what is charged alone would.
    assert budget.epsilon_of(first.rho) < committed * 0.99
    body = {"epsilon_limit": committed * 0.99, "name": "other"}
    error = refused(client.post(path, json=body), "limit_below_spent")
    assert (error["param"], error["epsilon_committed"]) == ("epsilon_limit", committed)
    unchanged = get(client, budget_id)
    assert (unchanged["epsilon_limit"], unchanged["name"]) == (10.0, "default")  # all of a request or nothing
    assert kinds(client, budget_id) == ["opened", "reserved", "charged", "reserved"]

    lowered = client.post(path, json={"epsilon_limit": committed * 1.000001, "name": "other"}).json()
    assert (lowered["epsilon_limit"], lowered["name"]) == (committed * 1.000001, "other")
    assert lowered["fraction_used"] == pytest.approx(1.0, abs=1e-4)
    assert kinds(client, budget_id)[4:] == ["renamed", "limit_lowered"]
    with pytest.raises(BudgetExceeded):
        reserve(watched, "ftjob-3", second)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"delta": 1e-5}, "delta"),
        ({"rdp_order": 3}, "rdp_order"),
        ({"privacy_unit": {"column": "x"}}, "privacy_unit"),
        ({"epsilon_limit": -1}, "epsilon_limit"),
        ({"policy": {"max_target_epsilon": 0}}, "policy.max_target_epsilon"),
        ({}, None),
    ],
)
def test_what_was_promised_stays(client: TestClient, budget_id: str, change: dict, param: str | None):
    error = refused(client.post(f"/v1/privacy_budgets/{budget_id}", json=change), "invalid_request")
    assert error["param"] == param
    assert kinds(client, budget_id) == ["opened"]


def test_a_limit_that_promises_nothing_is_refused(client: TestClient, budget_id: str):
    for limit in (1e9, 1e-3):  # too large for sums to be exact; too small for the budget's order
        error = refused(
            client.post(f"/v1/privacy_budgets/{budget_id}", json={"epsilon_limit": limit}), "invalid_budget"
        )
        assert error["param"] == "epsilon_limit"


def test_a_closed_budget_takes_no_further_job(
    client: TestClient, watched: Database, budget_id: str, make_file: Callable[..., str], make_key: Callable[..., str]
):
    running = plain_charge(budget_id, 0.5)
    reserve(watched, "ftjob-1", running)
    path = f"/v1/privacy_budgets/{budget_id}"
    refused(client.post(f"{path}/close", headers=key(make_key("submit"))), "insufficient_scope", 403)
    for _ in range(2):
        closed = client.post(f"{path}/close").json()
        assert (closed["status"], closed["epsilon_remaining"]) == ("closed", 0.0)
        assert closed["still_fit"]["jobs"] == 0
    assert kinds(client, budget_id) == ["opened", "reserved", "closed"]
    job = {"model": MODEL, "training_file": make_file()}
    refused(client.post("/v1/fine_tuning/jobs", json=job), "budget_closed")
    refused(client.post(path, json={"epsilon_limit": 50}), "budget_closed")
    settle(watched, "ftjob-1", None)  # what was admitted goes on
    assert get(client, budget_id)["rho_spent"] == running.rho


def test_an_owner_bounds_what_one_job_may_promise(client: TestClient, budget_id: str, make_file: Callable[..., str]):
    path, file = f"/v1/privacy_budgets/{budget_id}", make_file()
    policy = {"max_target_epsilon": 2.0, "max_target_delta": None}
    assert client.post(path, json={"policy": policy}).json()["policy"] == policy

    def submit(epsilon: float, verb: str = "") -> Any:
        body = {"model": MODEL, "training_file": file, "privacy": {"target_epsilon": epsilon}}
        return client.post(f"/v1/fine_tuning/jobs{verb}", json=body)

    for verb in ("", "/estimate"):
        assert refused(submit(2.5, verb), "budget_policy")["param"] == "privacy.target_epsilon"
    assert submit(2.0).status_code == 200
    assert client.post(path, json={"policy": None}).json()["policy"] is None
    assert submit(2.5).status_code == 200
    assert kinds(client, budget_id)[1:] == ["policy_changed", "reserved", "policy_changed", "reserved"]


def test_what_one_job_may_promise_holds_for_a_validation_file_under_another_budget(
    client: TestClient, make_file: Callable[..., str]
):
    """An evaluation there has an ε of its own, which may be larger than the job's, and is all that is charged there."""
    policy = {"max_target_epsilon": 2.0}
    other = client.post("/v1/privacy_budgets", json={**BUDGET, "epsilon_limit": 10.0, "policy": policy}).json()["id"]
    files = {"training_file": make_file(), "validation_file": make_file(budget_id=other)}

    def submit(evaluation: float, target: float, verb: str = "") -> Any:
        asked = {"privacy": {"target_epsilon": target}, "evaluation": {"epsilon": evaluation}}
        return client.post(f"/v1/fine_tuning/jobs{verb}", json={"model": MODEL, **files, **asked})

    for verb in ("", "/estimate"):
        assert refused(submit(6.0, 1.0, verb), "budget_policy")["param"] == "evaluation.epsilon"
    assert submit(2.0, 3.0).status_code == 200  # the target is a promise about the training file alone


def test_a_budget_of_people_takes_no_job_on_records(
    client: TestClient, watched: Database, make_file: Callable[..., str]
):
    made = client.post("/v1/privacy_budgets", json=BUDGET | {"privacy_unit": {"column": "patient_id"}}).json()
    assert made["privacy_unit"] == {"column": "patient_id"}
    job = {"model": MODEL, "training_file": make_file(budget_id=made["id"])}
    for verb in ("", "/estimate"):
        refused(client.post(f"/v1/fine_tuning/jobs{verb}", json=job), "privacy_unit_mismatch")
    by_record = plain_charge(made["id"], 0.1)
    with pytest.raises(service.InvalidRequest):
        reserve(watched, "ftjob-1", by_record)
    reserve(watched, "ftjob-1", Charge(made["id"], by_record.dp_event, by_record.rho, unit_column="patient_id"))


# --- figures ---------------------------------------------------------------------------------------------------------


def test_how_many_more_jobs_like_the_last_one(client: TestClient, watched: Database, budget_id: str):
    assert get(client, budget_id)["still_fit"] is None
    charge = real_charge(budget_id, accounting(watched, budget_id), 1.5, 50)
    reserve(watched, "ftjob-0", charge)
    told = get(client, budget_id)["still_fit"]
    assert (told["like_job"], told["rho_each"]) == ("ftjob-0", charge.rho)
    assert told["jobs"] >= 2
    for number in range(told["jobs"]):
        assert get(client, budget_id)["still_fit"]["jobs"] == told["jobs"] - number
        reserve(watched, f"ftjob-{number + 1}", charge)
    assert get(client, budget_id)["still_fit"]["jobs"] == 0
    with pytest.raises(BudgetExceeded):
        reserve(watched, "ftjob-more", charge)


def test_an_exactly_fitting_job_still_fits_once(client: TestClient, watched: Database, budget_id: str):
    capacity = accounting(watched, budget_id).capacity
    half = Charge(budget_id, {"type": "gaussian", "noise_multiplier": 1.0}, capacity / UNIT // 2 * UNIT)
    reserve(watched, "ftjob-1", half)
    assert get(client, budget_id)["still_fit"]["jobs"] == 1


def test_figures_at_several_deltas_are_the_accountants(client: TestClient, watched: Database, budget_id: str):
    budget = accounting(watched, budget_id)
    first, second = (real_charge(budget_id, budget, noise, 60) for noise in (2.0, 3.0))
    reserve(watched, "ftjob-1", first)
    settle(watched, "ftjob-1", None)
    alone = get(client, budget_id)
    mechanism = from_json(first.dp_event)
    figure = pld_epsilon(mechanism, 1e-6)
    assert alone["epsilon_spent"] == alone["if_fixed_in_advance"]["epsilon"] == figure.epsilon
    assert [at["delta"] for at in alone["epsilon_at"]] == [1e-5, 1e-6, 1e-7, 1e-8, 1e-9]
    for at in alone["epsilon_at"]:
        exact = pld_epsilon(mechanism, at["delta"], discretization=figure.discretization).epsilon
        assert at["if_fixed_in_advance"] == pytest.approx(exact, rel=1e-9)
        assert at["epsilon_spent"] == pytest.approx(exact, rel=1e-9)

    reserve(watched, "ftjob-2", second)
    two = get(client, budget_id)
    both = compose([mechanism, from_json(second.dp_event)])
    for at in two["epsilon_at"]:
        interval = interval_for(rdp_epsilon(both, 1e-6), 1e-6, 120)
        exact = pld_epsilon(both, at["delta"], discretization=interval).epsilon
        assert at["if_fixed_in_advance"] == pytest.approx(exact, rel=1e-9)
        assert at["if_fixed_in_advance"] > at["epsilon_spent"]  # the second is only reserved
    assert (two["rho_spent"], two["rho_reserved"]) == (first.rho, second.rho)
    assert two["fraction_used"] == (first.rho + second.rho) / budget.capacity
    settle(watched, "ftjob-2", None)
    adaptive = get(client, budget_id)
    for at in adaptive["epsilon_at"]:  # chosen after the first was seen: the filter's figure, which is larger
        assert at["epsilon_spent"] > at["if_fixed_in_advance"]


def test_a_second_look_is_fast(client: TestClient, watched: Database, budget_id: str):
    """However many jobs the budget has: the figures are remembered under the ledger's head."""
    budget = accounting(watched, budget_id)
    charge = real_charge(budget_id, budget, 30.0, 5)
    with watched.writing() as session:
        for number in range(100):
            service.reserve(session, f"ftjob-{number}", [charge], actor="test")
    asked: list[str] = []
    event.listen(watched.engine, "before_cursor_execute", lambda *call: asked.append(call[2]))
    before = get(client, budget_id)
    assert any("FROM reservations" in statement for statement in asked)
    asked.clear()

    def seconds() -> float:
        started = time.perf_counter()
        assert get(client, budget_id) == before
        return time.perf_counter() - started

    assert min(seconds() for _ in range(10)) < 0.05
    assert not any("FROM reservations" in statement for statement in asked)
    reserve(watched, "ftjob-more", charge)
    assert get(client, budget_id)["rho_reserved"] == before["rho_reserved"] + charge.rho


def test_a_timeline_to_plot(client: TestClient, watched: Database, budget_id: str):
    budget = accounting(watched, budget_id)
    whole, part = (real_charge(budget_id, budget, 2.0, steps) for steps in (100, 40))
    reserve(watched, "ftjob-1", whole)
    settle(watched, "ftjob-1", {budget_id: (part.dp_event, part.rho)})
    client.post(f"/v1/privacy_budgets/{budget_id}", json={"epsilon_limit": 12})
    reserve(watched, "ftjob-2", whole)

    line = get(client, budget_id, "/timeline")
    assert [(point["kind"], point["job_id"]) for point in line["data"]] == [
        ("reserved", "ftjob-1"),
        ("charged", "ftjob-1"),
        ("released", "ftjob-1"),
        ("reserved", "ftjob-2"),
    ]
    rest = whole.rho - part.rho
    assert [(point["rho_charged"], point["rho_reserved"]) for point in line["data"]] == [
        (0.0, whole.rho),
        (part.rho, rest),
        (part.rho, 0.0),
        (part.rho, whole.rho),
    ]
    last = line["data"][-1]
    assert last["epsilon_charged"] == budget.epsilon_of(part.rho)
    assert last["epsilon_charged"] + last["epsilon_reserved"] == pytest.approx(budget.epsilon_of(part.rho + whole.rho))
    assert [limit["epsilon_limit"] for limit in line["limits"]] == [10.0, 12.0]
    times = [point["created_at"] for point in line["data"]]
    assert times == sorted(times)

    pages, after = [], None
    while True:
        page = get(client, budget_id, "/timeline", limit=3, **({"after": after} if after else {}))
        pages += page["data"]
        after = page["data"][-1]["id"]
        if not page["has_more"]:
            break
    assert pages == line["data"]
    refused(client.get(f"/v1/privacy_budgets/{budget_id}/timeline", params={"after": "entry-none"}), "invalid_after")


@pytest.mark.every_database
def test_an_audit_finds_what_was_changed(client: TestClient, watched: Database, budget_id: str):
    charge = plain_charge(budget_id, 0.5)
    reserve(watched, "ftjob-1", charge)
    settle(watched, "ftjob-1", {budget_id: (charge.dp_event, 0.125)})
    reserve(watched, "ftjob-2", charge)
    sound = get(client, budget_id, "/audit")
    assert (sound["intact"], sound["entries"], sound["first_broken_sequence"]) == (True, 5, None)
    assert sound["ledger_head"] == get(client, budget_id)["ledger_head"]

    with watched.writing() as session:
        reservation = session.query(Reservation).filter_by(job_id="ftjob-1").one()
        reservation.rho_charged = 0.0  # the row that admission counts, the ledger untouched
    audited = get(client, budget_id, "/audit")
    assert (audited["intact"], audited["sums_agree"], audited["first_broken_sequence"]) == (False, False, None)
    with watched.writing() as session:
        session.query(LedgerEntry).filter_by(sequence=3).one().rho = 0.0
    assert get(client, budget_id, "/audit")["first_broken_sequence"] == 3
