"""From a finished trainer's folder to a published bundle: an exact list of files, each cleared, hashed and stored."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.orm import Session

from app.budgets import service as budgets
from app.budgets import status
from app.catalog.families import GROUP_NORM_CODE
from app.jobs.lifecycle import Claimed
from app.models import archives, folder_reader, model_folder
from app.models import service as models
from app.signing import ReportKeys
from app.storage.interface import Storage
from worker import job_folder, metrics_gate, privacy_report
from worker.privacy_report import LedgerPosition
from worker.trainer.spec import METRICS_FILE, MODEL_FOLDER, TrainerSpec

log = structlog.get_logger(__name__)

#: Made here.
REPORT, METRICS = "privacy_report.json", "metrics.json"
#: Without these there is no model.
_REQUIRED = ("README.md", "config.json", "model.safetensors")
#: What reads the inputs: of text, or of images.
_PROCESSORS = (
    {"tokenizer.json", "tokenizer_config.json"},
    {"source.spm", "target.spm", "vocab.json", "tokenizer_config.json"},
    {"sentencepiece.bpe.model", "vocab.json", "tokenizer_config.json"},
    {"preprocessor_config.json"},
)

#: In these transformers looks for code of the folder's own, or of another on a hub.
_CONFIGURATIONS = ("config.json", "generation_config.json", "tokenizer_config.json", "preprocessor_config.json")

_CHUNK = 1 << 20


class IncompleteResults(RuntimeError):
    """The trainer said that it had finished, but its results are not a bundle."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """The files to publish, and the two that are also shown with the model."""

    folder: Path
    names: tuple[str, ...]
    metrics: Mapping[str, Any]
    report: Mapping[str, Any]


def ledger_positions(session: Session, claimed: Claimed) -> list[LedgerPosition]:
    """Where the ledgers of the job's budgets stand."""
    positions = []
    for charge in claimed.charges:
        budget = budgets.get(session, claimed.project_id, charge["budget_id"])
        state = status.read(session, budget)
        positions.append(
            LedgerPosition(
                budget_id=budget.id,
                sequence=budget.next_sequence - 1,
                head_hash=budget.head_hash,
                accounting=state.accounting,
                plans=len(state.committed),
                rho=state.usage.total,
            )
        )
    return positions


def build(
    claimed: Claimed,
    spec: TrainerSpec,
    executed: Mapping[str, int],
    positions: list[LedgerPosition],
    folder: Path,
    keys: ReportKeys,
    *,
    checkpoint: bool = False,
) -> Bundle:
    """Completes the bundle below `folder`: cleared metrics, the signed report, nothing that is not on the list.

    checkpoint: whether it is of a checkpoint, which brings no metrics and a report of the steps until there.
    Raises IncompleteResults where something is missing or does not fit the plan.
    """
    model = folder / MODEL_FOLDER
    try:
        raw = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
        curve = metrics_gate.cleared_curve(raw.pop("train_loss_curve", None), spec.plan, executed)
        if checkpoint:
            metrics = metrics_gate.NO_METRICS_YET
        else:
            metrics = metrics_gate.cleared_metrics(raw, spec.evaluation, spec.task.type, spec.task.labels)
        metrics = {**metrics, **curve}
        runtime = dataclasses.asdict(spec.runtime)
        report = privacy_report.build(claimed, executed, positions, runtime, keys, checkpoint=checkpoint)
    except (OSError, ValueError, KeyError) as error:
        log.exception("results_refused")
        raise IncompleteResults from error
    for name, content in ((METRICS, metrics), (REPORT, report)):
        (model / name).write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
    names = tuple(
        name for name in sorted(models.BUNDLE_FILES) if (model / name).is_file() and not (model / name).is_symlink()
    )
    left_behind = sum(1 for _ in model.iterdir()) - len(names)
    if left_behind:
        log.warning("bundle_files_left_behind", count=left_behind)
    if not holds_only_our_code(model):
        log.error("bundle_code_refused")
        raise IncompleteResults
    if not set(_REQUIRED) <= set(names) or not any(processor <= set(names) for processor in _PROCESSORS):
        raise IncompleteResults
    return Bundle(model, names, metrics, report)


def holds_only_our_code(folder: Path) -> bool:
    """Whether a bundle's file of classes, if it has one, is this service's own, word for word, and its configurations
    name no other code, which might be anybody's on a hub: whoever downloads it is asked to trust it."""
    path = folder / GROUP_NORM_CODE
    if path.exists() and not (path.is_file() and path.read_bytes() == _own_code()):
        return False
    return not any(folder_reader.keys_of_code(_configuration(folder / name), own=True) for name in _CONFIGURATIONS)


def _configuration(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # then transformers reads nothing of it, either
        return {}
    return content if isinstance(content, dict) else {}


@cache
def _own_code() -> bytes:
    return resources.files("worker.trainer.families").joinpath(GROUP_NORM_CODE).read_bytes()


def store(storage: Storage, prefix: str, bundle: Bundle) -> dict[str, Any]:
    """Stores the bundle under `prefix`; the fields of `models.service.publish`."""
    described = []
    for name in bundle.names:
        storage.put_file(f"{prefix}/{name}", bundle.folder / name)
        described.append(_described(bundle.folder / name, name))
    return {
        "storage_prefix": prefix,
        "files": described,
        "archives": archives.describe(described, lambda path: _chunks(bundle.folder / path)),
        "metrics": dict(bundle.metrics),
        "privacy_report": dict(bundle.report),
        "base_facts": _base_facts(bundle),
    }


def _base_facts(bundle: Bundle) -> dict[str, Any] | None:
    """The model as the base of another job; None where it cannot be one (an adapter alone, for instance)."""
    try:
        found = model_folder.inspect(bundle.folder, bundle.folder, "", "fine_tuned")
        facts = dataclasses.replace(found.base, digest=found.digest(job_folder.sha256)).to_dict()
        return {**facts, "parameter_names": list(found.base.parameter_names)}
    except (folder_reader.Refused, OSError) as reason:
        log.info("model_is_no_base", reason=str(reason))
        return None


def _described(path: Path, name: str) -> dict[str, Any]:
    size, crc, digest = 0, 0, hashlib.sha256()
    for chunk in _chunks(path):
        size += len(chunk)
        crc = zlib.crc32(chunk, crc)
        digest.update(chunk)
    return {"path": name, "bytes": size, "sha256": digest.hexdigest(), "crc32": crc}


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk
