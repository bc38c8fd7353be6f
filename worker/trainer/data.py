"""A job's private rows: read, checked against what the plan counts, and split by the job's key."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from worker.trainer.dp.randomness import JobRandomness
from worker.trainer.dp.sampler import split_units
from worker.trainer.failure import TrainerFailure
from worker.trainer.spec import TRAINING_FILE, VALIDATION_FILE, TrainerSpec
from worker.trainer.tasks.text_classification import Examples, TextClassification

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Encoded rows and the units that own them.

    rows_of_unit: for each unit, its rows; unit_of_row: the inverse, (rows,). By default each row is its own unit.
    """

    examples: Examples
    rows_of_unit: tuple[Indices, ...]
    unit_of_row: Indices

    @property
    def num_units(self) -> int:
        """Units, public by declaration."""
        return len(self.rows_of_unit)


@dataclass(frozen=True, slots=True, eq=False)
class JobData:
    """What a job trains on, and what it evaluates on (None: nothing)."""

    training: Dataset
    evaluation: Dataset | None


def load_data(folder: Path, spec: TrainerSpec, task: TextClassification, randomness: JobRandomness) -> JobData:
    """Reads the folder's Parquet files; TrainerFailure `data_mismatch` where they are not what was planned for."""
    plan, data = spec.plan, spec.data
    if plan.privacy_unit.column is not None:
        raise TrainerFailure("data_mismatch", "units by column are not supported yet")
    columns = _read(folder / TRAINING_FILE, spec, data.num_rows)
    if data.num_rows != plan.num_units + data.num_held_out:
        raise TrainerFailure("data_mismatch", "training and held-out units are not the file's")
    validation: Dataset | None = None
    if spec.evaluation != "none" and data.has_validation_file:
        rows = _read(folder / VALIDATION_FILE, spec, data.num_validation_rows)
        validation = _dataset(task.encode(rows), np.arange(data.num_validation_rows))
    examples = task.encode(columns)
    if not data.num_held_out:
        return JobData(_dataset(examples, np.arange(data.num_rows)), validation)
    split = split_units(randomness, num_units=data.num_rows, num_held_out=data.num_held_out)
    held_out = _dataset(examples, split.held_out)
    return JobData(_dataset(examples, split.training), validation or held_out)


def _dataset(examples: Examples, rows: Indices) -> Dataset:
    chosen = Examples([examples.input_ids[row] for row in rows], examples.labels[rows])
    units = np.arange(len(rows))
    return Dataset(chosen, tuple(units.reshape(-1, 1)), units)


def _read(path: Path, spec: TrainerSpec, num_rows: int) -> dict[str, list[object]]:
    try:
        # Names, not paths: pyarrow would open a URL, and the sandbox would refuse it late.
        with path.open("rb") as file:
            table = pq.read_table(file, columns=sorted(set(spec.task.columns.values())))
        columns = {role: table.column(name).to_pylist() for role, name in spec.task.columns.items()}
    except (OSError, KeyError, pa.ArrowException) as error:
        raise TrainerFailure("data_mismatch", str(error)) from error
    if table.num_rows != num_rows or num_rows == 0:
        raise TrainerFailure("data_mismatch", "the file has another number of rows")
    return columns
