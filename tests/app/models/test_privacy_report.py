"""The report of a model over HTTP: signed JSON for programs, a page for people, and the key to check it with."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.db.session import Database
from app.models.report_page import render
from app.models.tables import Model
from app.signing import check_signature
from tests import reports

HTML = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


class Page(HTMLParser):
    """Tags that are opened and closed, text, and what would load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []
        self.text = " ".join(self.words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture
def model_id(publish: Callable[..., str], database: Database) -> str:
    identifier = publish()
    with database.writing() as session:
        session.get_one(Model, identifier).privacy_report = reports.private_report()
    return identifier


def test_programs_get_the_signed_report(client: TestClient, model_id: str) -> None:
    for headers in ({}, {"accept": "application/json"}, {"accept": "application/json, text/html;q=0.5"}):
        answer = client.get(f"/v1/models/{model_id}/privacy_report", headers=headers)
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["vary"] == "accept"
        check_signature(answer.json())
        assert answer.json() == client.get(f"/v1/models/{model_id}").json()["privacy_report"]


def test_people_get_a_page_that_loads_nothing(client: TestClient, model_id: str) -> None:
    answer = client.get(f"/v1/models/{model_id}/privacy_report", headers=HTML)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    page = Page(answer.text)
    assert not page.tags & {"script", "img", "link", "iframe", "a", "form", "b"}
    assert not page.attributes & {"src", "href", "onload", "onclick", "style"}
    assert model_id in page.text


def test_the_page_says_all_that_the_report_does() -> None:
    report = reports.private_report(own_validation=True, earlier_rho=0.03125)
    page = Page(render("ft-1", report))
    for text in [*report["not_covered"], *report["released"], report["guarantee"]["meaning"]]:
        assert text in page.text
    for fact in report["treated_as_public"]:
        assert fact["what"] in page.text
    assert '["a <b>", "ä"]' in page.text, "shown as written, not as a tag"
    for value in (report["signature"]["public_key"], report["digests"]["plan"], "ftjob-1", "pb-1", "pb-2"):
        assert value in page.text
    assert "δ = 1e-05, for one record." in page.text
    assert "wrongly accuses 0.1%" in page.text


def test_the_page_has_a_line_for_each_option_of_the_job() -> None:
    rows = render("ft-1", reports.private_report(taken_at=5)).split("<tr>")
    for name, value in {
        "seed": "7",
        "checkpoint steps": "<code>[5]</code>",
        "phase main": "learning_rate",
        "exports": "onnx",
        "training file": "file-1",
        "validation file": "none",
    }.items():
        (row,) = (row for row in rows if f"every option of the job: {name}<" in row)
        assert value in row


def test_figures_on_the_page_are_rounded_up() -> None:
    report = reports.private_report()
    report["guarantee"]["epsilon"] = 1.98761
    report["budgets"][0]["attack_power"][0]["true_positive_rate"] = 0.00411
    text = Page(render("ft-1", report)).text
    assert "ε = 1.9877," in text
    assert "more than 0.42% of those" in text


def test_a_model_without_privacy_says_so_first() -> None:
    text = Page(render("ft-1", reports.public_report())).text
    assert "Trained without differential privacy" in text
    assert "ε" not in text


@pytest.mark.parametrize("report", [{}, {"epsilon": "<script>"}, {"mechanism": "dp_sgd"}])
def test_a_report_of_another_form_is_shown_as_it_is(report: dict[str, Any]) -> None:
    page = Page(render("<ft>", report))
    assert "script" not in page.tags
    assert "<ft>" in page.text
    assert all(str(value) in page.text for value in report.values())


def test_the_key_is_the_one_that_signs(client: TestClient, app: Any, make_key: Callable[..., str]) -> None:
    reader = {"authorization": f"Bearer {make_key('read')}"}
    answer = client.get("/v1/privacy/signing_key", headers=reader).json()
    assert (answer["object"], answer["algorithm"]) == ("privacy.signing_key", "Ed25519")
    check_signature(app.state.report_keys.sign({"a": 1}), answer["public_key"])
