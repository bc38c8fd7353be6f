"""What was spent on a model before it became the base of another job: read from its signed report, never from memory.

To train a released model further is post-processing of that release: whoever is in the first job's rows alone stays
covered by the first job's ε. Whoever is in the rows of several jobs is covered by their composition, which is stated
where they were charged to one budget; over two budgets nothing says who is in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def lineage_of(model_id: str, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry for each job, the model's own first: {model, job, base_model, mechanism, privacy_unit, epsilon, delta,
    accountant, charges: [{privacy_budget, datasets, dp_event}]}, the last five None or empty without privacy."""
    guarantee = report.get("guarantee") or {}
    own = {
        "model": model_id,
        "job": report.get("job"),
        "base_model": report.get("base_model"),
        "mechanism": report.get("mechanism"),
        "privacy_unit": guarantee.get("privacy_unit"),
        "epsilon": guarantee.get("epsilon"),
        "delta": guarantee.get("delta"),
        "accountant": guarantee.get("accountant"),
        "charges": [
            {"privacy_budget": budget["privacy_budget"], "datasets": budget["datasets"], "dp_event": budget["dp_event"]}
            for budget in report.get("budgets", ())
        ],
    }
    earlier = (report.get("lineage") or {}).get("models", ())
    return [own, *earlier]
