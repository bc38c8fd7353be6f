"""Entities in tags, as conlleval counts them: precision, recall and F1 by seqeval. For public data only.

An entity is right where its type, its first and its last token are. Tags are `O`, or a letter for the place in the
entity and its type: IOB, IOBES (BMES) and BILOU.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

_TAG = re.compile(r"([BIESMLU])-(.+)")
#: Other letters for the same places; seqeval reads IOB and IOBES without being told which.
_SPELLING = {"M": "I", "L": "E", "U": "S"}


def of_a_scheme(tags: Sequence[str]) -> bool:
    """Whether each of them is `O` or names a place in an entity, and one does."""
    named = [tag for tag in tags if tag != "O"]
    return bool(named) and all(map(_TAG.fullmatch, named))


def scores(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Exact, over all sentences: entity_precision, entity_recall, entity_f1 (micro), entity_f1_per_type.

    Undefined ratios are 0. A sentence's two lists have one length.
    """
    from seqeval.metrics import classification_report  # with scikit-learn: seconds to import, and few jobs need it

    with warnings.catch_warnings():  # of types that were never predicted
        warnings.simplefilter("ignore")
        report: Any = classification_report(_spelt(true), _spelt(predicted), output_dict=True, zero_division=0)
    averages = {name: report.pop(name) for name in ("micro avg", "macro avg", "weighted avg")}
    return {
        "entity_precision": float(averages["micro avg"]["precision"]),
        "entity_recall": float(averages["micro avg"]["recall"]),
        "entity_f1": float(averages["micro avg"]["f1-score"]),
        "entity_f1_per_type": {name: float(of_type["f1-score"]) for name, of_type in report.items()},
    }


def lines(metrics: Mapping[str, Any]) -> list[str]:
    """For the model card; none where no entities were counted."""
    if "entity_f1" not in metrics:
        return []
    types = ", ".join(f"{name} {value:.4f}" for name, value in metrics["entity_f1_per_type"].items())
    return [
        f"- entity F1 {metrics['entity_f1']:.4f}, precision {metrics['entity_precision']:.4f}, "
        f"recall {metrics['entity_recall']:.4f}, over whole entities" + (f" ({types})" if types else "")
    ]


def _spelt(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[_SPELLING.get(tag[0], tag[0]) + tag[1:] for tag in row] for row in rows]
