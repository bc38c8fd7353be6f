"""What the worker asks of the exporter: the folder's `export.json`. Frozen, free of torch.

The folder:
    export.json            this value
    model/                 the model's bundle, each file checked against its digest
    data/public.parquet    rows of a file declared public, where a student is distilled
    results/export/        what is made; results/metrics.json: size, speed, agreement
    control.sock, exporter.log (`trainer.log` of the process that hosts it): as in `worker.trainer.spec`
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPEC_FILE = "export.json"
MODEL_FOLDER, PUBLIC_FILE = "model", "data/public.parquet"
EXPORT_FOLDER, METRICS_FILE = "results/export", "results/metrics.json"

#: What an export can fail with in the exporter, and what its user reads.
FAILURES: dict[str, str] = {
    "format_not_supported": "Models of this architecture have no export of this format.",
    "export_check_failed": "The export did not load in its runtime, or answered otherwise than the model.",
    "student_not_smaller": "The student would have as many layers as the model: ask for fewer, by `num_layers`.",
    "student_check_failed": "The student does not follow the model on rows that were held out.",
    "model_invalid": "The model's bundle cannot be loaded.",
    "base_model_invalid": "The base model cannot be loaded.",
    "adapter_not_exact": "What the model learnt is no low-rank change of its base.",
    "data_mismatch": "The public file does not hold the text that the student is to be trained on.",
    "out_of_memory": "The exporting process ran out of memory.",
    "exporter_error": "The exporting process failed.",
}


class ExportFailure(Exception):
    """A failure whose code the user sees. The text stays in the folder's log."""

    def __init__(self, code: str, text: str = "") -> None:
        assert code in FAILURES
        super().__init__(text or FAILURES[code])
        self.code = code


@dataclass(frozen=True, slots=True)
class StudentSpec:
    """num_layers: of the student; None: half of the model's, rounded up. columns: role → column of the public file.

    source_prefix: what the model was trained to read before every source. languages_of: the family whose words say the
    languages of each row instead, which are columns then.
    """

    columns: Mapping[str, str]
    num_layers: int | None
    n_epochs: int
    source_prefix: str = ""
    languages_of: str = ""


@dataclass(frozen=True, slots=True)
class ExportSpec:
    """One attempt at one export.

    base_path: the folder of the base, for an adapter. rank: of the job's LoRA. weights_sha256: of the bundle's weights.
    """

    export_id: str
    model_id: str
    job_id: str
    base: str
    format: str
    weights_sha256: str
    base_path: str | None = None
    rank: int | None = None
    student: StudentSpec | None = None
    threads: int = 0

    def write(self, folder: Path) -> None:
        """Writes export.json into an existing folder."""
        (folder / SPEC_FILE).write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> ExportSpec:
        """Reads export.json. Raises KeyError, TypeError or ValueError on anything that `write` did not write."""
        fields: dict[str, Any] = json.loads((folder / SPEC_FILE).read_text(encoding="utf-8"))
        student = fields.pop("student")
        return cls(**fields, student=None if student is None else StudentSpec(**student))
