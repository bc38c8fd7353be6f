"""How near an export's answers are to the model's, and how fast it gives them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from app.catalog.exports import ExportFormat
from worker.exporter.architectures import Answers, probabilities
from worker.exporter.reference import Batch, Reference, answer
from worker.exporter.spec import ExportFailure

#: Rows in one pass whose time is taken, and how many passes.
TIMED_ROWS, TIMED_PASSES = 32, 5

#: Answers that hardly vary have no scale of their own: differences below this are none.
_FLOOR = 1e-4

Answer = Callable[[Batch], Tensor]


def compare(reference: Tensor, others: Tensor, meaning: Answers, mask: Tensor | None = None) -> dict[str, float | None]:
    """Answers of the model and of its export to the same inputs, as logits (rows, …, outputs).

    mask: (rows, …) of answers that count. agreement: share of answers with the same class (or the same set of labels);
    None for numbers. max_difference: of any probability (or number). relative_difference: root mean square
    of the difference over that of the reference's deviation from its mean answer: a constant answer has 1 or more.
    """
    ours, theirs = probabilities(reference, meaning), probabilities(others, meaning)
    if ours.shape != theirs.shape:
        raise ExportFailure("export_check_failed", f"answers of another shape: {tuple(theirs.shape)}")
    if mask is not None:
        ours, theirs = ours[mask], theirs[mask]
    difference = (ours - theirs).abs()
    spread = float((ours - ours.mean(0)).square().mean().sqrt())
    agreement = None
    if meaning == "classes":
        agreement = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    elif meaning == "labels":
        agreement = float(((ours > 0.5) == (theirs > 0.5)).all(-1).float().mean())
    return {
        "agreement": agreement,
        "max_difference": float(difference.max()),
        "relative_difference": float(difference.square().mean().sqrt()) / max(spread, _FLOOR),
    }


def check(reference: Reference, form: ExportFormat, run: Answer, public: Batch | None = None) -> dict[str, Any]:
    """The figures of an export that was reloaded; `run` answers in its runtime.

    Compared on synthetic inputs, or, for a model of its own right, on public rows that it was not trained on. Raises
    ExportFailure `export_check_failed` where an answer is not finite, or too far from the model's.
    """
    inputs = reference.inputs if public is None else public
    expected = reference.logits if public is None else answer(reference.model, public)
    answers = run(inputs)
    if not bool(torch.isfinite(answers).all()):
        raise ExportFailure("export_check_failed", "an answer is not finite")
    figures = compare(expected, answers, reference.meaning, reference.mask(inputs))
    distance = figures["relative_difference"]
    assert distance is not None
    if not distance <= form.max_relative_difference:
        code = "export_check_failed" if public is None else "student_check_failed"
        raise ExportFailure(code, f"relative difference {distance}")
    return {
        **figures,
        "max_relative_difference": form.max_relative_difference,
        "compared_on": "synthetic inputs" if public is None else "held-out rows of the public file",
        "num_inputs": len(next(iter(inputs.values()))),
    }


def speed(reference: Reference, run: Answer) -> dict[str, float]:
    """Rows a second of the export and of the model in float32 by torch, on this machine, in turns."""
    batch = {name: value[:TIMED_ROWS] for name, value in reference.inputs.items()}
    rows = len(next(iter(batch.values())))

    def by_torch(inputs: Batch) -> Tensor:
        return answer(reference.model, inputs)

    seconds: dict[str, list[float]] = {"export": [], "model": []}
    for number in range(TIMED_PASSES + 1):
        for name, respond in (("export", run), ("model", by_torch)):
            began = time.perf_counter()
            respond(batch)
            if number:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
    export, model = (statistics.median(seconds[name]) for name in ("export", "model"))
    return {
        "rows_per_second": rows / export,
        "model_rows_per_second": rows / model,
        "speedup": model / export,
    }
