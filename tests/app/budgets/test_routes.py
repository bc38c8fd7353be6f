"""/v1/privacy_budgets as its users see it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import pytest
from fastapi.testclient import TestClient

BUDGET = {"name": "patients", "epsilon_limit": 4.0, "delta": 1e-6}


def key(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def test_making_and_reading_a_budget(client: TestClient):
    made = client.post("/v1/privacy_budgets", json=BUDGET)
    assert made.status_code == 200
    budget = made.json()
    assert budget["id"].startswith("pb-")
    assert (budget["object"], budget["status"]) == ("privacy_budget", "open")
    assert (budget["epsilon_limit"], budget["delta"], budget["epsilon_spent"]) == (4.0, 1e-6, 0.0)
    assert (budget["epsilon_remaining"], budget["neighboring_relation"]) == (4.0, "zero_out")
    assert client.get(f"/v1/privacy_budgets/{budget['id']}").json() == budget

    listed = client.get("/v1/privacy_budgets").json()
    assert listed["data"][0]["id"] == budget["id"]
    assert len(listed["data"]) == 2  # with the project's own
    assert listed["has_more"] is False


def test_a_reader_can_check_the_ledger(client: TestClient):
    """From what the route answers alone: the hash covers every field but `id`, `object` and `hash`."""
    budget_id = client.post("/v1/privacy_budgets", json=BUDGET).json()["id"]
    page = client.get(f"/v1/privacy_budgets/{budget_id}/entries", params={"order": "asc"}).json()
    (entry,) = page["data"]
    assert entry["kind"] == "opened"
    assert entry["details"]["epsilon_limit"] == 4.0
    covered = {name: value for name, value in entry.items() if name not in ("id", "object", "hash")}
    canonical = json.dumps(covered, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(canonical.encode()).hexdigest() == entry["hash"]
    assert client.get(f"/v1/privacy_budgets/{budget_id}").json()["ledger_head"] == {
        "sequence": 1,
        "hash": entry["hash"],
    }


def test_only_admins_make_budgets(client: TestClient, make_key: Callable[..., str]):
    for scope in ("read", "submit"):
        refused = client.post("/v1/privacy_budgets", json=BUDGET, headers=key(make_key(scope)))
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
    assert client.get("/v1/privacy_budgets", headers=key(make_key("read"))).status_code == 200


def test_another_project_sees_nothing(client: TestClient, make_key: Callable[..., str]):
    budget_id = client.post("/v1/privacy_budgets", json=BUDGET).json()["id"]
    stranger = key(make_key("admin", project="other"))
    for path in (f"/v1/privacy_budgets/{budget_id}", f"/v1/privacy_budgets/{budget_id}/entries"):
        foreign = client.get(path, headers=stranger)
        missing = client.get(path.replace(budget_id, "pb-none"), headers=stranger)
        assert foreign.status_code == missing.status_code == 404
        assert foreign.json() == missing.json()
    assert budget_id not in client.get("/v1/privacy_budgets", headers=stranger).text


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"epsilon_limit": 0}, "epsilon_limit"),
        ({"epsilon_limit": 1e9}, "epsilon_limit"),
        ({"delta": 0}, "delta"),
        ({"delta": 1}, "delta"),
        ({"name": ""}, "name"),
        ({"neighboring_relation": "add_remove"}, "neighboring_relation"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_bad_budget_is_refused(client: TestClient, change: dict, param: str):
    refused = client.post("/v1/privacy_budgets", json=BUDGET | change)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param
