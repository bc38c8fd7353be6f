"""Privacy reports as a worker writes them, of plans small enough to check in a moment, and every way to change one."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

from app.catalog.recipes import LOSS_SHARE, QUANTILE
from app.jobs.lifecycle import Claimed
from app.privacy.calibration import calibrate
from app.privacy.dp_events import event_for, to_json
from app.privacy.filter import RenyiBudget
from app.privacy.plan import Dataset, GaussianRelease, LossSum, Part, PrivacyPlan, SampledGaussian
from app.settings import Settings
from app.signing import ReportKeys, load_report_keys
from worker.privacy_report import LedgerPosition, build

ROWS = "a" * 64
DELTA = 1e-5

Place = tuple[str | int, ...]


def keys(secret: bytes = b"\x07" * 32) -> ReportKeys:
    return load_report_keys(Settings(), secret)


def parts(sigma: float, evaluated: Dataset = "training", riding: bool = False) -> tuple[Part, ...]:
    main = SampledGaussian("main", 1 / 8, 12, sigma, max_grad_norm=1.0, clipping="automatic")
    if riding:
        main = dataclasses.replace(main, clipping="adaptive", quantile=QUANTILE, loss=LossSum(1.5, LOSS_SHARE))
    return (
        GaussianRelease("centring", 25.0, 1.0),
        main,
        GaussianRelease("evaluation", 12.0, 1.0, dataset=evaluated),
    )


def claim(
    plan: PrivacyPlan,
    charges: list[dict[str, Any]],
    evaluation: str = "private",
    checkpoint_steps: list[int] | None = None,
) -> Claimed:
    resolved = {
        "task": {
            "type": "text_classification",
            "columns": {"text": "note", "label": "ward"},
            "labels": ["a <b>", "ä"],
            "labels_source": "declared",
            "max_length": 128,
        },
        "phases": [{"name": "main", "learning_rate": 0.5}],
        "evaluation": evaluation,
        "checkpoint_steps": checkpoint_steps or [],
        "training_digest": ROWS,
        "validation_digest": None,
        "certified_datasets": ["training"],
    }
    return Claimed(
        job_id="ftjob-1",
        project_id="proj-1",
        fence=1,
        attempt=1,
        model="all-MiniLM-L6-v2",
        suffix=None,
        seed=7,
        training_file_id="file-1",
        validation_file_id=None,
        request={"export": {"formats": ["onnx", "student"], "student": {"training_file": "file-2"}}},
        plan=plan,
        charges=charges,
        resolved=resolved,
        checkpoint=None,
        runtime=None,
        started_at=1.0,
        cancel_requested=False,
    )


def private_report(
    *,
    own_validation: bool = False,
    earlier_rho: float = 0.0,
    limit: float = 8.0,
    lineage: bool = False,
    taken_at: int | None = None,
    riding: bool = False,
) -> dict[str, Any]:
    """own_validation: the evaluation is charged to a second budget. earlier_rho: spent by another plan before.

    lineage: that plan made the base; and one before it, on other people's rows.
    taken_at: the report is of the checkpoint behind that step. riding: losses, and adaptive clipping's count, are
    noised with the gradients.
    """
    found = calibrate(lambda sigma: parts(sigma, "validation" if own_validation else "training", riding), 2.0, DELTA)
    plan = PrivacyPlan(
        mechanism="dp_sgd",
        num_units=320,
        parts=found.parts,
        target_epsilon=2.0,
        target_delta=DELTA,
        epsilon=found.epsilon,
        accountant=found.accountant,
        num_validation_units=80,
    )
    accounting = RenyiBudget.create(limit, 1e-6)
    charges, positions = [], []
    for name, dataset in [("pb-1", "training"), ("pb-2", "validation")][: 2 if own_validation else 1]:
        event = event_for(plan, [dataset])
        rho = accounting.rho_of(event)
        charges.append({"budget_id": name, "dp_event": to_json(event), "rho": rho, "datasets": [dataset]})
        plans = 2 if earlier_rho or lineage else 1
        earlier_rho = rho if lineage else earlier_rho
        positions.append(LedgerPosition(name, 1 + plans, "b" * 64, accounting, plans, rho + earlier_rho))
    executed = {part.name: part.num_steps for part in plan.parts}
    if taken_at is not None:
        executed = {"centring": 1, "main": taken_at - 1}
    claimed = claim(plan, charges, checkpoint_steps=None if taken_at is None else [taken_at])
    if lineage:
        promised = {
            "mechanism": "dp_sgd",
            "privacy_unit": "record",
            "epsilon": found.epsilon,
            "delta": DELTA,
            "accountant": found.accountant,
        }
        event = {"datasets": ["training"], "dp_event": charges[0]["dp_event"]}
        first, second = ("ft-1", "ftjob-01"), ("ft-2", "ftjob-02")
        ancestors = [
            {**promised, "model": second[0], "job": second[1], "base_model": first[0]}
            | {"charges": [{"privacy_budget": "pb-1", **event}]},
            {**promised, "model": first[0], "job": first[1], "base_model": "all-MiniLM-L6-v2"}
            | {"charges": [{"privacy_budget": "pb-0", **event}]},
        ]
        resolved = {**claimed.resolved, "base": {"lineage": ancestors}}
        claimed = dataclasses.replace(claimed, model=second[0], resolved=resolved)
    runtime = {"device": "cpu", "threads": 1}
    return build(claimed, executed, positions, runtime, keys(), checkpoint=taken_at is not None)


def public_report() -> dict[str, Any]:
    plan = PrivacyPlan(mechanism="none", num_units=320, parts=parts(0.0)[1:2])
    return build(claim(plan, [], "none"), {"main": 12}, [], {"device": "cpu"}, keys())


def leaves(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every value in the JSON that holds no other."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if inner is None:
        yield place, value
    else:
        for key, child in inner:
            yield from leaves(child, (*place, key))


def changes(value: Any) -> list[Any]:
    """Small lies in place of a leaf: the larger and the smaller number, another word, nothing."""
    match value:
        case None:
            return [0, "x"]
        case bool():
            return [not value]
        case int():
            return [value + 1, value - 1]
        case float():
            return [value * 1.002 or 0.001, value * 0.998 or -0.001]
        case str():
            other = "0" if value[:1] != "0" else "1"
            return [value + "x", other + value[1:], None]
    raise TypeError(type(value))


def replaced(report: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(report)
    holder: Any = changed
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    return changed


def signed_again(report: dict[str, Any], by: ReportKeys) -> dict[str, Any]:
    return by.sign({key: value for key, value in report.items() if key != "signature"})
