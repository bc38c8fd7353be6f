"""The report of a model that was really trained: verified offline with the server's key, and shown as a page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from app.signing import check_signature
from tests.reports import changes, leaves, replaced
from tests.running import Running


@pytest.fixture(scope="module")
def http(service: Running, client: openai.OpenAI) -> Any:
    headers = {"authorization": f"Bearer {client.api_key}"}
    with httpx.Client(base_url=f"{service.url}/v1", headers=headers, timeout=60) as opened:
        yield opened


@pytest.fixture(scope="module")
def bundled(http: httpx.Client, trained: Any) -> bytes:
    """privacy_report.json, as it lies in the bundle."""
    return http.get(f"/models/{trained.fine_tuned_model}/files/privacy_report.json").raise_for_status().content


def _verify(*words: str | Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "app.cli", "verify", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_a_real_report_is_accepted_with_the_servers_key(http: httpx.Client, bundled: bytes, tmp_path: Path) -> None:
    report, key = tmp_path / "privacy_report.json", http.get("/privacy/signing_key").json()["public_key"]
    report.write_bytes(bundled)
    status, told = _verify(report, "--public-key", key)
    assert status == 0, told
    assert "FAIL" not in told
    status, told = _verify(report, "--public-key", "0" * 64)
    assert status == 1, told


def test_a_real_report_is_refused_with_any_field_changed(bundled: bytes, tmp_path: Path) -> None:
    report = json.loads(bundled)
    check_signature(report)
    tried = 0
    for place, value in leaves(report):
        with pytest.raises(ValueError, match="sign"):
            check_signature(replaced(report, place, changes(value)[0]))
        tried += 1
    assert tried > 100
    changed = tmp_path / "changed.json"
    changed.write_bytes(bundled.replace(b'"dp_sgd"', b'"none"', 1))
    assert _verify(changed)[0] == 1


def test_the_report_is_the_same_everywhere(
    http: httpx.Client, client: openai.OpenAI, trained: Any, bundled: bytes
) -> None:
    path = f"/models/{trained.fine_tuned_model}/privacy_report"
    assert http.get(path).json() == json.loads(bundled)
    page = http.get(path, headers={"accept": "text/html"})
    assert page.headers["content-type"].startswith("text/html")
    assert json.loads(bundled)["signature"]["value"] in page.text


def test_the_report_speaks_of_the_ledger_and_the_job(http: httpx.Client, trained: Any, bundled: bytes) -> None:
    report = json.loads(bundled)
    (budget,) = report["budgets"]
    entries = http.get(f"/privacy_budgets/{budget['privacy_budget']}/entries", params={"limit": 100}).json()["data"]
    (reserved,) = [entry for entry in entries if entry["kind"] == "reserved" and trained.id in entry.values()]
    assert reserved["sequence"] <= budget["ledger"]["sequence"]
    assert reserved["dp_event"] == budget["dp_event"]
    assert budget["so_far"]["epsilon"] <= budget["limit"]["epsilon"] == 60.0
    assert report["job"] == trained.id
    assert report["guarantee"]["epsilon"] <= 8.0


def test_no_text_of_the_rows_is_in_it(snippets: Path, bundled: bytes) -> None:
    words = {word for word in snippets.read_text(encoding="utf-8").split() if len(word) > 9}
    report = bundled.decode()
    assert [word for word in words if word in report] == []
