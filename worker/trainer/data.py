"""A job's private rows: read, gathered into units, checked against what the plan counts, and split by the job's key.

Units stand in the order of their names, whatever the order of the rows. Under zero_out a neighbour keeps every unit's
name, and so its slot: sampling and the split see the same slots, and only one unit's rows differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from worker.trainer.dp.randomness import JobRandomness
from worker.trainer.dp.sampler import split_units
from worker.trainer.failure import TrainerFailure
from worker.trainer.messages import Truncation
from worker.trainer.spec import TRAINING_FILE, VALIDATION_FILE, TrainerSpec
from worker.trainer.tasks.examples import Examples
from worker.trainer.tasks.interface import TrainerTask

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Encoded rows and the units that own them.

    rows_of_unit: for each unit, its rows; unit_of_row: the inverse, (rows,). By default each row is its own unit. A
    unit may be empty: it keeps its slot, and contributes nothing.
    """

    examples: Examples
    rows_of_unit: tuple[Indices, ...]
    unit_of_row: Indices

    @property
    def num_units(self) -> int:
        """Units, public by declaration."""
        return len(self.rows_of_unit)

    @property
    def single_rows(self) -> list[list[int]]:
        """Each row by itself, for passes in which no unit needs to stay together: one of any size fits the memory."""
        return [[row] for row in range(len(self.examples))]

    @property
    def weight_of_row(self) -> Tensor:
        """1 / (rows of its unit), (rows,) float64: a weighted sum over rows is one over units' means."""
        return torch.from_numpy(1.0 / np.bincount(self.unit_of_row, minlength=1)[self.unit_of_row])


@dataclass(frozen=True, slots=True, eq=False)
class JobData:
    """What a job trains on, and what it evaluates on (None: nothing). truncation: of each file, for its
    owner; none of images."""

    training: Dataset
    evaluation: Dataset | None
    truncation: tuple[Truncation, ...] = ()


def load_data(folder: Path, spec: TrainerSpec, task: TrainerTask, randomness: JobRandomness) -> JobData:
    """Reads the folder's Parquet files; TrainerFailure `data_mismatch` where they are not what was planned for."""
    plan, data = spec.plan, spec.data
    column = plan.privacy_unit.column
    columns, units = _read(folder / TRAINING_FILE, spec, data.num_rows, column)
    if len(units) != plan.num_units + data.num_held_out:
        raise TrainerFailure("data_mismatch", "training and held-out units are not the file's")
    validation: Dataset | None = None
    truncation: list[Truncation] = []
    if spec.evaluation != "none" and data.has_validation_file:
        # A file declared public has no units but its rows.
        its_column = column if spec.evaluation == "private" else None
        its_columns, its_units = _read(folder / VALIDATION_FILE, spec, data.num_validation_rows, its_column)
        if len(its_units) != plan.num_validation_units:
            raise TrainerFailure("data_mismatch", "validation units are not the file's")
        its_examples = task.encode(its_columns)
        truncation += _truncation("validation", its_examples)
        validation = gather(its_examples, its_units)
    examples = task.encode(columns)
    truncation += _truncation("training", examples)
    if not data.num_held_out:
        return JobData(gather(examples, units), validation, tuple(truncation))
    split = split_units(randomness, num_units=len(units), num_held_out=data.num_held_out)
    held_out = gather(examples, [units[unit] for unit in split.held_out])
    training = gather(examples, [units[unit] for unit in split.training])
    return JobData(training, validation or held_out, tuple(truncation))


def _truncation(dataset: str, examples: Examples) -> list[Truncation]:
    if not examples.lost:
        return []
    cut = {side: {"rows": int((lost > 0).sum()), "tokens": int(lost.sum())} for side, lost in examples.lost.items()}
    tokens = int(examples.lengths.sum()) + sum(side["tokens"] for side in cut.values())
    return [Truncation(dataset, len(examples), tokens, cut)]


def gather(examples: Examples, units: Sequence[Indices]) -> Dataset:
    """The examples of these units, each given as its rows of `examples`, renumbered unit by unit."""
    sizes = [len(rows) for rows in units]
    rows = np.concatenate([np.empty(0, dtype=np.int64), *units])
    rows_of_unit = np.split(np.arange(len(rows)), np.cumsum(sizes)[:-1])
    return Dataset(examples.select(rows), tuple(rows_of_unit), np.repeat(np.arange(len(sizes)), sizes))


def _units(names: pa.ChunkedArray) -> list[Indices]:
    """The rows of each unit, in order; units in the order of their names."""
    if names.null_count:
        raise TrainerFailure("data_mismatch", "a row has no unit")
    _, unit_of_row, sizes = np.unique(
        np.array(names.to_pylist(), dtype=object), return_inverse=True, return_counts=True
    )
    return np.split(np.argsort(unit_of_row, kind="stable"), np.cumsum(sizes)[:-1])


def _read(
    path: Path, spec: TrainerSpec, num_rows: int, unit_column: str | None
) -> tuple[dict[str, list[object]], list[Indices]]:
    """The task's columns by role, and the rows of each unit."""
    wanted = {*spec.task.columns.values()} | ({unit_column} if unit_column is not None else set())
    try:
        # Names, not paths: pyarrow would open a URL, and the sandbox would refuse it late.
        with path.open("rb") as file:
            table = pq.read_table(file, columns=sorted(wanted))
        columns = {role: table.column(name).to_pylist() for role, name in spec.task.columns.items()}
        units = (
            list(np.arange(table.num_rows).reshape(-1, 1)) if unit_column is None else _units(table.column(unit_column))
        )
    except (OSError, KeyError, pa.ArrowException) as error:
        raise TrainerFailure("data_mismatch", str(error)) from error
    if table.num_rows != num_rows or num_rows == 0:
        raise TrainerFailure("data_mismatch", "the file has another number of rows")
    return columns, units
