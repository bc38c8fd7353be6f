"""What each way to make an export is given, and gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from worker.exporter.comparison import Answer
from worker.exporter.reference import Batch, Reference
from worker.exporter.spec import ExportSpec


@dataclass(frozen=True, slots=True)
class Made:
    """An export that was written and loaded again. usage: how a user loads it, Markdown for its README.

    figures: of the way that it was made; parameters: of the export. public: rows to compare it on, where it is a model
    in its own right; else it is compared on synthetic inputs.
    """

    answer: Answer
    usage: str
    parameters: int
    figures: Mapping[str, Any] = field(default_factory=dict)
    public: Batch | None = None


#: (folder of this attempt, spec, the model, an empty folder to write to) → what was made. Raises ExportFailure.
Maker = Callable[[Path, ExportSpec, Reference, Path], Made]
