"""One attempt at one export: load the model, make the export, reload and compare it, describe it."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from app.catalog.exports import EXPORT_FORMATS, POST_PROCESSING, ExportFormat
from worker.exporter import card
from worker.exporter.comparison import check, speed
from worker.exporter.formats.maker import Made
from worker.exporter.formats.registry import MAKERS
from worker.exporter.reference import Reference
from worker.exporter.spec import EXPORT_FOLDER, METRICS_FILE, MODEL_FOLDER, ExportFailure, ExportSpec
from worker.trainer.control import Control
from worker.trainer.messages import Failed, Finished

#: What an export has beside its weights: of the bundle, unchanged.
_WEIGHTS = ("model.safetensors", "README.md", "metrics.json")


def run(folder: Path) -> dict[str, Any]:
    """Makes the folder's export; returns its metrics, which are also in the folder. Raises ExportFailure."""
    spec = ExportSpec.read(folder)
    form = EXPORT_FORMATS[spec.format]
    if spec.threads:
        torch.set_num_threads(spec.threads)
    reference = Reference.load(folder / MODEL_FOLDER)
    output = folder / EXPORT_FOLDER
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    made = MAKERS[spec.format](folder, spec, reference, output)
    metrics = {
        **_sizes(folder, form, made, reference),
        **check(reference, form, made.answer, made.public),
        **speed(reference, made.answer),
        **made.figures,
    }
    _complete(folder, spec, form, made, metrics)
    return metrics


def attempt(folder: Path, control: Control) -> bool:
    """`run`, with every failure as a fixed code for the user and its traceback on standard error. True: no failure."""
    began = time.monotonic()
    try:
        run(folder)
    except Exception as error:  # the one place where a failure becomes a code
        traceback.print_exc(file=sys.stderr)
        control.send(Failed(_code(error)))
        return False
    control.send(Finished({}, time.monotonic() - began))
    return True


def _sizes(folder: Path, form: ExportFormat, made: Made, reference: Reference) -> dict[str, Any]:
    own = sum(path.stat().st_size for path in (folder / EXPORT_FOLDER).iterdir() if path.name in form.weights)
    model = (reference.folder / "model.safetensors").stat().st_size
    return {
        "weights_bytes": own,
        "model_weights_bytes": model,
        "compression": model / own,
        "parameters": made.parameters,
    }


def _complete(folder: Path, spec: ExportSpec, form: ExportFormat, made: Made, metrics: dict[str, Any]) -> None:
    """Adds what a user needs beside the weights: config, tokenizer, the privacy report, and what this export is."""
    output = folder / EXPORT_FOLDER
    for path in (folder / MODEL_FOLDER).iterdir():
        if path.name not in _WEIGHTS and not (output / path.name).exists():
            shutil.copy(path, output / path.name)
    record = {
        "format": spec.format,
        "runtime": form.runtime,
        "model": spec.model_id,
        "job": spec.job_id,
        "base_model": spec.base,
        "made_from": {"file": "model.safetensors", "sha256": spec.weights_sha256},
        "privacy": {"epsilon": 0.0, "statement": POST_PROCESSING, "report": "privacy_report.json"},
        "metrics": metrics,
    }
    (output / "export.json").write_text(json.dumps(record, ensure_ascii=False, indent=2), encoding="utf-8")
    (output / "README.md").write_text(_card(folder / MODEL_FOLDER, spec, form, made, metrics), encoding="utf-8")
    (folder / METRICS_FILE).write_text(json.dumps(metrics), encoding="utf-8")
    for path in (*output.iterdir(), folder / METRICS_FILE):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _card(folder: Path, spec: ExportSpec, form: ExportFormat, made: Made, metrics: dict[str, Any]) -> str:
    agreement = metrics["agreement"]
    same = "" if agreement is None else f"{agreement:.1%} of its answers were the model's own; "
    student = ""
    if spec.student is not None:
        student = (
            f"The student has {metrics['num_layers']} of {metrics['model_num_layers']} layers, and learnt the model's "
            f"answers to {metrics['public_rows']} texts of a file that was declared public.\n\n"
        )
    return (
        "\n\n".join(filter(None, [f"# {spec.model_id}: {form.title}", card.notes(folder), made.usage])) + "\n\n"
        f"{student}Reloaded with {form.runtime} and compared with the model on {metrics['num_inputs']} "
        f"{metrics['compared_on']}: {same}relative difference {metrics['relative_difference']:.4g}. Weights: "
        f"{metrics['weights_bytes'] / 1e6:.1f} MB, {metrics['compression']:.2f} times smaller than the model's; "
        f"{metrics['speedup']:.2f} times as fast on the machine that made it.\n\n"
        f"## Privacy\n\n{POST_PROCESSING} `export.json` names the weights that this was made from by their SHA-256; "
        "`privacy_report.json` names the job.\n"
    )


def _code(error: Exception) -> str:
    if isinstance(error, ExportFailure):
        return error.code
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if memory or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
        return "out_of_memory"
    return "exporter_error"
