"""Evaluation: the task's statistics over units that were not trained on, and what may leave of them.

A unit counts once, by the mean over its rows, each bounded in L2 by the plan's sensitivity under zero_out. Private: the
sums are noised, and everything else is computed from the noised sums. Public: exact, on data declared public. The
number of evaluated units is public in either case; exact private sums never leave this module.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from app.catalog.recipes import EVALUATION
from app.catalog.tasks import TASKS
from app.privacy.plan import GaussianRelease
from worker.trainer.checkpoint import State
from worker.trainer.data import Dataset
from worker.trainer.dp.reduce import rank_and_world_size, sum_over_ranks_
from worker.trainer.dp.release import bounded_rows, gaussian_release
from worker.trainer.dp.step import TOLERANCE
from worker.trainer.job import Job, evaluation_sensitivity
from worker.trainer.loop import progress

#: Entries of statistics held at once.
_AT_ONCE = 1 << 20


def evaluate(job: Job, dataset: Dataset | None, state: State) -> dict[str, Any]:
    """The content of metrics.json but for the loss curve: only what is cleared to leave."""
    if job.spec.evaluation == "none":
        return {"released": "none", "reason": "no evaluation was asked for: nothing about private rows was measured"}
    assert dataset is not None
    # A file declared public has no units but its records.
    by_column = job.spec.plan.privacy_unit.column is not None and job.spec.evaluation == "private"
    evaluated = {
        "dataset": "validation_file" if job.spec.data.has_validation_file else "held_out_split",
        "num_units": dataset.num_units,
        "averaged_over": "units" if by_column else "records",
        **({"labels": list(job.spec.task.labels)} if job.spec.task.labels else {}),
    }
    totals, loss = sums(job, dataset)
    if job.spec.evaluation == "public":
        return {
            "released": "public",
            "method": "exact, on data declared public",
            **evaluated,
            **job.task.metrics(totals, dataset.num_units),
            **({} if loss is None else {"loss": loss / dataset.num_units}),
            **(job.task.public_metrics(job.model, dataset.examples) if rank_and_world_size()[0] == 0 else {}),
        }
    part = job.spec.plan.part(EVALUATION)
    assert isinstance(part, GaussianRelease)
    job.control.await_allowed(progress(job, state))
    # As of gradients: a unit's statistics depend in their last bits on the batch that it shares with others.
    noised = gaussian_release(job.randomness, part, totals, tolerance=TOLERANCE)
    state.executed[EVALUATION] = 1
    job.control.progress(progress(job, state), last=True)
    std = part.noise_multiplier * part.sensitivity * (1.0 + TOLERANCE)
    told = job.task.metrics(noised, dataset.num_units, std)
    withheld = dict.fromkeys(TASKS[job.spec.task.type].public_metrics, "public_data_only")
    withheld |= told.pop("not_released", {})
    return {
        "released": "private",
        "method": "Gaussian noise on sums over units, charged to the plan; the rest follows from them",
        "noise_std": std,
        **evaluated,
        **told,
        **({"not_released": withheld} if withheld else {}),
    }


@torch.inference_mode()
def sums(job: Job, dataset: Dataset) -> tuple[Tensor, float | None]:
    """The task's statistics, summed over units, (k,) float64, private; and their losses', of data declared public alone
    and where it is a metric of its own: nothing bounds it.

    Each row's statistics are bounded to the plan's sensitivity; of a unit with k rows, each row counts 1/k, so that the
    unit's mean is bounded too.
    """
    bound = evaluation_sensitivity(job.spec.task)
    with_loss = job.spec.evaluation == "public" and "loss" in TASKS[job.spec.task.type].public_metrics
    total = torch.zeros(_num_statistics(job), dtype=torch.float64)
    loss = torch.zeros(1, dtype=torch.float64)
    weights = dataset.weight_of_row
    for chosen, batch in job.shared_batches(dataset.examples, dataset.single_rows):
        # In float32 whatever the training computes in: one unit must not move where another one falls.
        outputs = job.task.outputs(job.model, batch)
        for piece in _pieces(len(chosen), len(total)):
            part = {name: value[piece] for name, value in batch.items()}
            rows = bounded_rows(job.task.statistics(outputs[piece], part), bound)
            weight = weights[torch.from_numpy(chosen[piece])]
            total += weight @ rows
            if with_loss:
                loss += weight @ job.task.loss(outputs[piece], part).to("cpu", torch.float64)
    sum_over_ranks_([total, loss])
    return total, float(loss) if with_loss else None


def _num_statistics(job: Job) -> int:
    """k, of a synthetic row: a rank may have no row of its own."""
    batch = job.task.batch(job.task.synthetic(job.model, rows=1), [0], job.device.torch_device)
    return job.task.statistics(job.task.outputs(job.model, batch), batch).shape[1]


def _pieces(rows: int, width: int) -> Iterator[slice]:
    """Slices of rows whose statistics fit into a few megabytes: a confusion matrix of 1,000 classes has a million."""
    size = max(1, _AT_ONCE // width)
    return (slice(start, start + size) for start in range(0, rows, size))
