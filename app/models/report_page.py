"""A privacy report as a page: for a person who signs for the data, not for a program. One file, nothing to load."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from app.privacy.report_format import OPTIONS

#: For the answer's header: the page runs nothing and fetches nothing.
CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse;width:100%;margin:.5rem 0}
th,td{text-align:left;vertical-align:top;padding:.25rem .6rem .25rem 0;border-bottom:1px solid #ddd}
code{font-size:.85em;overflow-wrap:anywhere}.large{font-size:1.3rem}
@media(prefers-color-scheme:dark){body{color:#e6e6e6;background:#161616}th,td{border-color:#444}}
"""

_PARTS = (
    ("name", "part"),
    ("dataset", "rows"),
    ("sample_rate", "sample rate"),
    ("executed_steps", "steps"),
    ("noise_multiplier", "noise multiplier"),
    ("max_grad_norm", "norm bound"),
    ("clipping", "clipping"),
    ("sensitivity", "sensitivity"),
)


def render(title: str, report: Mapping[str, Any]) -> str:
    """The page. A report of another form than today's is shown as it is."""
    try:
        body = "".join(_sections(report))
    except (KeyError, TypeError, ValueError, AttributeError):
        body = f"<pre>{escape(json.dumps(report, ensure_ascii=False, indent=2))}</pre>"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Privacy report: {escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body><h1>Privacy report of {escape(title)}</h1>{body}</body></html>"
    )


def _sections(report: Mapping[str, Any]) -> Iterable[str]:
    if "checkpoint" in report:
        stated = report["checkpoint"]
        yield _paragraph(f"Of a checkpoint, taken at step {stated['step_number']} of {stated['num_steps']}.")
    if report["mechanism"] == "none":
        yield _paragraph(report["statement"])
    else:
        yield from _promise(report["guarantee"])
        for budget in report["budgets"]:
            yield from _budget(budget)
    if "lineage" in report:
        yield from _lineage(report["lineage"])
    yield "<h2>What touched the rows</h2>"
    yield _table([words for _, words in _PARTS], [[part.get(key, "") for key, _ in _PARTS] for part in report["parts"]])
    for part in report["parts"]:
        if "noised_together" in part:
            yield _paragraph(f"Each step of the part {part['name']} noises together, as one mechanism:")
            held = [[h["what"], h["sensitivity"], h["noise_multiplier"]] for h in part["noised_together"]]
            yield _table(["sum of", "sensitivity", "noise multiplier"], held)
    yield "<h2>What was released</h2>" + _list(report["released"])
    yield "<h2>What was treated as public</h2>"
    yield _table(["fact", "value", "from"], _facts(report["treated_as_public"]))
    if report["not_covered"]:
        yield "<h2>What is not covered</h2>" + _list(report["not_covered"])
    yield "<h2>To check it</h2>"
    signature = report["signature"]
    rows = [
        ["job", report["job"]],
        ["base model", report["base_model"]],
        *([f"digest: {name}", value] for name, value in report["digests"].items() if value is not None),
        *([f"version: {name}", value] for name, value in report["versions"].items()),
        [f"{signature['algorithm']} key", signature["public_key"]],
        ["signature", signature["value"]],
    ]
    yield _table(["", ""], rows)
    yield (
        "<p>This page is made from <code>privacy_report.json</code>; only that file is signed. Check it, offline, with "
        "<code>privtune verify privacy_report.json --public-key KEY</code>.</p>"
    )


def _facts(stated: Iterable[Mapping[str, Any]]) -> Iterable[Sequence[Any]]:
    """A row each; of the job's options one for each of them, and for each phase."""
    for fact in stated:
        what, value, source = fact["what"], fact["value"], fact["source"]
        if what != OPTIONS:
            yield what, value, source
            continue
        for name, option in value.items():
            of_phases = [(f"phase {each['name']}", each) for each in option] if name == "phases" else []
            for told, each in of_phases or [(name.replace("_", " "), option)]:
                yield f"{what}: {told}", "none" if each in (None, [], {}) else each, source


def _promise(guarantee: Mapping[str, Any]) -> Iterable[str]:
    unit = guarantee["privacy_unit"]
    whose = "one record" if unit == "record" else f"all records that share a value of the column {unit['column']}"
    yield f'<p class="large">ε = {_figure(guarantee["epsilon"])}, δ = {guarantee["delta"]:g}, for {escape(whose)}.</p>'
    yield _paragraph(guarantee["meaning"])
    yield _paragraph(f"Sampling: {guarantee['sampling']}. Accountant: {guarantee['accountant']}.")


def _budget(budget: Mapping[str, Any]) -> Iterable[str]:
    so_far, limit = budget["so_far"], budget["limit"]
    yield f"<h2>Budget <code>{escape(budget['privacy_budget'])}</code></h2>"
    yield _table(
        ["of this job", ""],
        [
            [f"ε at δ = {budget['delta']:g}", _figure(budget["epsilon"])],
            ["ε had one unit been replaced by another", _figure(budget["epsilon_replace_one"])],
            *([f"ε at δ = {point['delta']:g}", _figure(point["epsilon"])] for point in budget["epsilon_at"]),
        ],
    )
    for point in budget["attack_power"]:
        true, false = point["true_positive_rate"], point["false_positive_rate"]
        yield (
            f"<p>Nobody who sees what was released, and wrongly accuses {false:.1%} of those whose records were not "
            f"used, recognises more than {_percent(true)} of those whose were.</p>"
        )
    yield _table(
        [f"of all jobs, at δ = {limit['delta']:g}", ""],
        [
            ["plans charged or reserved", so_far["plans"]],
            ["ε so far, this job in full", _figure(so_far["epsilon"])],
            ["limit of ε", f"{limit['epsilon']:g}"],
            ["accountant", so_far["accountant"]],
            ["place in the ledger", f"entry {budget['ledger']['sequence']}, {budget['ledger']['head_hash']}"],
        ],
    )


def _lineage(lineage: Mapping[str, Any]) -> Iterable[str]:
    yield "<h2>Where the base model comes from</h2>" + _paragraph(lineage["meaning"])
    columns = ("model", "job", "base_model", "mechanism", "privacy_unit", "delta")
    heads = ["model", "job", "its base", "mechanism", "unit", "δ", "ε"]
    rows = [
        [*("" if entry[key] is None else entry[key] for key in columns), _figure(entry["epsilon"] or 0.0)]
        for entry in lineage["models"]
    ]
    yield _table(heads, rows)
    for stated in lineage["composed"]:
        yield _paragraph(
            f"Who is in the rows of {', '.join(stated['jobs'])}: ε = {_figure(stated['epsilon'])}, "
            f"δ = {stated['delta']:g}, on budget {stated['privacy_budget']} ({stated['accountant']})."
        )


def _figure(epsilon: float) -> str:
    """Rounded up: a guarantee is never stated stronger than it was certified."""
    return f"{math.ceil(epsilon * 1e4) / 1e4:g}"


def _percent(share: float) -> str:
    return f"{math.ceil(share * 1e4) / 1e2:.2f}%"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str | int):
        return escape(str(value))
    return f"<code>{escape(json.dumps(value, ensure_ascii=False))}</code>"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    top = "".join(f"<th>{escape(text)}</th>" for text in head) if any(head) else ""
    lines = "".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table>{f'<tr>{top}</tr>' if top else ''}{lines}</table>"


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _list(texts: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"
