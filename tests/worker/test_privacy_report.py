"""A report that a worker wrote is accepted; one that lies anywhere is not, even where the liar signs it again."""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import Any

import pytest

from app.privacy import report_format as form
from app.privacy.accountants import pld_epsilon, pld_epsilons
from app.privacy.dp_events import from_json
from app.privacy.report_check import check_report
from app.signing import check_signature
from tests import reports
from tests.reports import Place, changes, leaves, replaced, signed_again
from worker.privacy_report import build

KINDS: dict[str, dict[str, Any]] = {
    "first on its budget": {},
    "over the filter's capacity": {"limit": 2.4},
    "second, with a validation file of its own": {"own_validation": True, "earlier_rho": 0.03125},
    "of a base that was trained here": {"lineage": True, "limit": 20.0},
    "of a checkpoint": {"taken_at": 5},
    "of a checkpoint, over the filter's capacity": {"taken_at": 5, "limit": 2.4, "own_validation": True},
    "of a checkpoint, of a base that was trained here": {"taken_at": 5, "lineage": True, "limit": 20.0},
    "with a loss curve and adaptive clipping": {"riding": True},
}

#: What no arithmetic can tell: only the server's signature vouches for it.
VOUCHED = {
    ("issued_at",),
    ("job",),
    ("base_model",),
    ("digests", "training_rows"),
    ("budgets", "privacy_budget"),
    ("budgets", "limit", "epsilon"),
    ("budgets", "so_far", "plans"),
    ("budgets", "ledger", "sequence"),
    ("budgets", "ledger", "head_hash"),
    ("runtime",),
    ("versions",),
    ("treated_as_public", "value"),
    # Jobs, and budgets that this job does not touch, are names.
    ("lineage", "models", "job"),
    ("lineage", "models", "base_model"),
    ("lineage", "models", "privacy_unit"),
    ("lineage", "models", "charges", "privacy_budget"),
    # Of a job on another budget only its ε is checked: a lie about a part that hardly counts leaves it as it is.
    ("lineage", "models", "charges", "dp_event", "events", "noise_multiplier"),
}


@cache
def report_of(kind: str) -> dict[str, Any]:
    return json.loads(json.dumps(reports.private_report(**KINDS[kind])))


def places(report: dict[str, Any]) -> set[Place]:
    """Of every value, also of those that hold others."""
    return {place[:depth] for place, _ in leaves(report) for depth in range(1, len(place) + 1)}


def holds(report: dict[str, Any]) -> bool:
    return all(check.holds for check in check_report(report))


def kind_of(place: Place) -> tuple[str, ...]:
    names = tuple(key for key in place if isinstance(key, str))
    if names[0] in ("runtime", "versions"):
        return names[:1]
    return names[:2] if names[0] == "treated_as_public" else names


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_accepted(kind: str) -> None:
    report = report_of(kind)
    assert [check for check in check_report(report) if not check.holds] == []
    check_signature(report)
    check_signature(report, reports.keys().public_key)


def test_it_states_every_option_of_the_job() -> None:
    """Also of what no arithmetic checks: whoever signs for the data asks what else was made of it."""
    (options,) = (f["value"] for f in report_of("of a checkpoint")["treated_as_public"] if f["what"] == form.OPTIONS)
    assert options == {
        "task": {"type": "text_classification"},
        "phases": [{"name": "main", "learning_rate": 0.5}],
        "evaluation": "private",
        "checkpoint_steps": [5],
        "exports": {"formats": ["onnx", "student"], "student": {"training_file": "file-2"}},
        "seed": 7,
        "training_file": "file-1",
        "validation_file": None,
    }


def test_checkpoints_that_were_asked_for_are_among_what_was_released() -> None:
    told = "the weights of checkpoints on the way, each with a report of its own"
    report = report_of("of a checkpoint")
    assert told in report["released"]
    assert told not in report_of("first on its budget")["released"]
    hidden = [text for text in report["released"] if text != told]
    assert not holds(signed_again({**report, "released": hidden}, reports.keys()))


def test_a_report_of_before_options_were_told_still_holds() -> None:
    report = copy.deepcopy(report_of("first on its budget"))
    for fact in report["treated_as_public"]:
        if fact["what"] == form.OPTIONS:
            fact["value"] = {key: fact["value"][key] for key in ("task", "phases", "evaluation")}
    assert holds(signed_again(report, reports.keys()))


def test_a_report_without_privacy_says_so() -> None:
    report = reports.public_report()
    assert holds(report)
    check_signature(report)
    assert report["statement"] == form.NOT_PRIVATE
    assert "guarantee" not in report
    assert not holds({**report, "statement": "Trained with care."})


@pytest.mark.parametrize("kind", KINDS)
def test_any_changed_field_breaks_the_signature(kind: str) -> None:
    report, tried = report_of(kind), 0
    for place, value in leaves(report):
        for lie in changes(value):
            with pytest.raises(ValueError, match="sign"):
                check_signature(replaced(report, place, lie))
            tried += 1
    assert tried > 200


@pytest.mark.parametrize(
    ("kind", "only"),
    [
        ("first on its budget", None),
        ("second, with a validation file of its own", None),
        ("of a base that was trained here", "lineage"),
        ("with a loss curve and adaptive clipping", "parts"),
    ],
)
def test_a_lie_that_is_signed_again_is_found_by_arithmetic(kind: str, only: str | None) -> None:
    report, liar = report_of(kind), reports.keys(b"\x66" * 32)
    believed = set()
    looked_at = {key: value for key, value in report.items() if key != "signature" and only in (None, key)}
    for place, value in leaves(looked_at):
        for lie in changes(value):
            forged = signed_again(replaced(report, place, lie), liar)
            check_signature(forged)
            with pytest.raises(ValueError, match="another key"):
                check_signature(forged, reports.keys().public_key)
            if holds(forged):
                believed.add(kind_of(place))
    assert believed - VOUCHED == set()


def test_nothing_can_be_left_out_or_added() -> None:
    report = report_of("second, with a validation file of its own")
    believed = set()
    for place in places(report):
        shorter = copy.deepcopy(report)
        holder: Any = shorter
        for key in place[:-1]:
            holder = holder[key]
        del holder[place[-1]]
        if place[0] != "signature" and holds(shorter):
            believed.add(kind_of(place))
        with pytest.raises(ValueError, match="sign"):
            check_signature(shorter)
        if isinstance(place[-1], str):
            longer = replaced(report, (*place[:-1], "more"), 1)
            if place[0] != "signature" and holds(longer):
                believed.add(kind_of(place))
            with pytest.raises(ValueError, match="sign"):
                check_signature(longer)
    # A budget left out is another report: that of a job whose other file was public.
    assert believed - VOUCHED == {("budgets",)}


def test_less_noise_everywhere_at_once_is_found() -> None:
    """The liar changes plan, parts, events and digest together, and leaves only ε as it was."""
    report = report_of("first on its budget")
    text = json.dumps(report)
    sigma = report["plan"]["parts"][1]["noise_multiplier"]
    forged = json.loads(text.replace(json.dumps(sigma), json.dumps(sigma * 0.98)))
    forged["digests"]["plan"] = form.digest(forged["plan"])
    failing = {check.name for check in check_report(forged) if not check.holds}
    assert {"guarantee", "budget 1: epsilon", "budget 1: replace-one", "budget 1: attack power"} <= failing
    assert "plan" not in failing
    assert "budget 1: event" not in failing


@pytest.mark.parametrize(
    ("part", "lie"),
    [
        (1, {"clipping": "none"}),
        (1, {"clipping": "adaptive"}),  # without the count that it follows
        (1, {"max_grad_norm": 0.0}),
        (2, {"sensitivity": 0.0}),
    ],
)
def test_a_plan_that_bounds_no_contribution_is_found(part: int, lie: dict[str, Any]) -> None:
    """Plan, part and digest are changed together: noise over a sensitivity that does not exist is no privacy."""
    forged = copy.deepcopy(report_of("first on its budget"))
    forged["plan"]["parts"][part] |= lie
    forged["parts"][part] |= lie
    forged["digests"]["plan"] = form.digest(forged["plan"])
    assert {check.name for check in check_report(forged) if not check.holds} == {"plan"}


def test_an_event_of_another_plan_is_found_though_its_figures_are_right() -> None:
    report = report_of("second, with a validation file of its own")
    other = {**report["budgets"][0], "datasets": ["validation"]}
    failing = {check.name for check in check_report(replaced(report, ("budgets", 1), other)) if not check.holds}
    assert failing == {"budget 2: event", "budget 2: so far"}


def test_what_a_rewriting_tool_did_is_forgiven() -> None:
    """jq and JavaScript write 1.0 as 1."""
    rewritten = form.parse(form.canonical(report_of("first on its budget")))
    assert '"max_grad_norm": 1,' in json.dumps(rewritten)
    assert holds(rewritten)
    check_signature(rewritten)


def test_the_kinds_are_what_they_say() -> None:
    first, over, second, _, taken, taken_over, *_ = (report_of(kind) for kind in KINDS)
    assert first["budgets"][0]["so_far"]["accountant"].startswith("PLD")
    assert over["budgets"][0]["so_far"]["accountant"].startswith("PLD")
    assert over["budgets"][0]["so_far"]["epsilon"] <= 2.4
    assert [budget["so_far"]["accountant"][:5] for budget in second["budgets"]] == ["Rényi", "Rényi"]
    assert [budget["datasets"] for budget in second["budgets"]] == [["training"], ["validation"]]
    assert first["guarantee"]["epsilon"] == first["budgets"][0]["epsilon"]
    assert taken["plan"] == first["plan"]
    assert taken["guarantee"]["epsilon"] == taken["budgets"][0]["epsilon"] < first["guarantee"]["epsilon"]
    assert taken["budgets"][0]["so_far"] == first["budgets"][0]["so_far"]  # what is reserved counts in full
    assert [budget["datasets"] for budget in taken_over["budgets"]] == [["training"]]  # nothing was evaluated yet


@pytest.mark.parametrize("steps", [3, 5, 12], ids=["fewer", "more", "all"])
def test_a_checkpoint_of_other_steps_than_it_says_is_found(steps: int) -> None:
    """Parts, event and step are changed together, and the figures left as they are."""
    report = report_of("of a checkpoint")
    assert report["parts"][1]["executed_steps"] == 4
    forged = replaced(report, ("parts", 1, "executed_steps"), steps)
    assert {check.name for check in check_report(forged) if not check.holds} >= {"plan", "budget 1: event"}
    forged["checkpoint"]["step_number"] = steps + 1
    forged["budgets"][0]["dp_event"]["events"][1]["count"] = steps
    failing = {check.name for check in check_report(forged) if not check.holds}
    assert failing >= {"guarantee", "budget 1: epsilon", "budget 1: replace-one"}
    assert failing.isdisjoint({"plan", "budget 1: event"})


def test_a_checkpoint_is_of_what_comes_first_in_the_plan() -> None:
    report = report_of("of a checkpoint")
    for lie in ({"step_number": 4}, {"step_number": 6}, {"num_steps": 13}, {"step_number": "5"}):
        assert not holds({**report, "checkpoint": {**report["checkpoint"], **lie}})
    assert not holds({key: value for key, value in report.items() if key != "checkpoint"})
    assert not holds({**report_of("first on its budget"), "checkpoint": {"step_number": 14, "num_steps": 14}})
    plan = reports.PrivacyPlan.from_dict(report["plan"])
    for executed in ({}, {"main": 3}, {"centring": 1, "evaluation": 1}, {"centring": 1, "main": 3, "evaluation": 1}):
        with pytest.raises(ValueError, match="what comes first"):
            build(reports.claim(plan, []), executed, [], {}, reports.keys(), checkpoint=True)


def test_a_limit_that_was_passed_is_found() -> None:
    report = report_of("second, with a validation file of its own")
    spent = report["budgets"][0]["so_far"]["epsilon"]
    assert holds(replaced(report, ("budgets", 0, "limit", "epsilon"), spent))
    assert not holds(replaced(report, ("budgets", 0, "limit", "epsilon"), spent * 0.99))


def test_figures_are_rounded_up() -> None:
    (budget,) = report_of("first on its budget")["budgets"]
    event = from_json(budget["dp_event"])
    figures = pld_epsilons(event, form.DELTAS, discretization=budget["discretization"])
    replace_one = pld_epsilon(event, budget["delta"], "replace_one", budget["discretization"])
    stated = [point["epsilon"] for point in budget["epsilon_at"]] + [budget["epsilon_replace_one"]]
    for figure, epsilon in zip([*figures, replace_one], stated, strict=True):
        assert figure.epsilon <= epsilon <= figure.epsilon + 1e-6


def test_rows_are_bound_but_not_shown() -> None:
    report = report_of("first on its budget")
    assert reports.ROWS not in json.dumps(report)
    assert report["digests"]["training_rows"] == reports.keys().commit(reports.ROWS)
    assert reports.keys(b"\x08" * 32).commit(reports.ROWS) != report["digests"]["training_rows"]


def test_there_is_no_report_of_half_a_job() -> None:
    plan = reports.PrivacyPlan.from_dict(report_of("first on its budget")["plan"])
    executed = {part.name: part.num_steps for part in plan.parts} | {"main": 3}
    with pytest.raises(ValueError, match="whole plan"):
        build(reports.claim(plan, []), executed, [], {}, reports.keys())


@pytest.mark.parametrize(
    "forged",
    [
        {},
        {"format": form.FORMAT},
        {"format": form.FORMAT, "mechanism": "dp_sgd"},
        {"format": form.FORMAT, "mechanism": []},
        {"signature": {}},
        {"signature": []},
        {"signature": {"algorithm": "none", "signed": form.SIGNED, "public_key": "", "value": ""}},
    ],
)
def test_what_is_no_report_is_refused(forged: dict[str, Any]) -> None:
    assert not holds(forged)
    with pytest.raises(ValueError, match="sign"):
        check_signature(forged)


@pytest.mark.parametrize("value", [[], "x", 1e308])
def test_no_shape_of_a_report_makes_the_check_fall_over(value: Any) -> None:
    report = report_of("second, with a validation file of its own")
    for place in places(report):
        check_report(replaced(report, place, value))
