"""Persons as units, from the file to the sums that are noised: against sums made here, one row at a time.

Patient 0 of sixteen owns thirty rows, the others one to three; no two patients share their first two words.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from app.catalog.recipes import CENTRING
from app.privacy.plan import GaussianRelease, SampledGaussian
from tests.trainer.dp.checks import distance
from tests.trainer.dp.oracles import clipped_sum, norm
from tests.trainer.jobs import BAD, FILLER, GOOD, KEY, LABELS, MadeJob, make_job
from worker.trainer import evaluate, loop
from worker.trainer.checkpoint import State
from worker.trainer.control import Control
from worker.trainer.data import Dataset, load_data
from worker.trainer.device import set_up_device
from worker.trainer.dp.engine import GradientEngine
from worker.trainer.dp.step import TOLERANCE
from worker.trainer.failure import TrainerFailure
from worker.trainer.features import pooled_features, pooled_vectors
from worker.trainer.job import Job, PreparedPhase, adapt, load_job
from worker.trainer.run import run

PATIENTS, LARGE, BOUND = 16, 30, 4
CLIP = 0.05  # below every gradient of a fresh head


def words(patient: int) -> str:
    return f"{FILLER[patient // 6]} {FILLER[patient % 6]}"


def table(large: int = LARGE, shuffled: int | None = None) -> tuple[list[tuple[str, str]], list[str]]:
    """Rows, and the patient of each; the rows of patients are mixed."""
    made = []
    for patient in range(PATIENTS):
        for visit in range(large if patient == 0 else 1 + patient % 3):
            telling = (GOOD if (patient + visit) % 2 else BAD)[visit % 3]
            text = f"{words(patient)} {telling} {' '.join(FILLER[: visit % 4])}".strip()
            made.append(((text, LABELS[(patient + visit // 2) % 2]), f"p{patient:02}"))
    order = np.random.default_rng(shuffled or 0).permutation(len(made))
    return [made[index][0] for index in order], [made[index][1] for index in order]


def made_job(folder: Path, base: Path, **options: Any) -> MadeJob:
    data, units = options.pop("table", None) or table()
    return make_job(
        folder,
        base,
        data=data,
        units=units,
        max_records_per_unit=options.pop("bound", BOUND),
        num_held_out=5,
        **options,
    )


def loaded(made: MadeJob) -> tuple[Job, tuple[PreparedPhase, ...], list[GradientEngine], Dataset, Dataset | None]:
    """The job up to its first step, with a head that is not zero."""
    job = load_job(made.folder, KEY, Control(None), made.spec, set_up_device(made.spec.runtime))
    phases = adapt(job)
    engines = loop.make_engines(job, phases)
    data = load_data(made.folder, made.spec, job.task, job.randomness)
    with torch.no_grad():
        job.family.head_module(job.model).weight.copy_(torch.tensor([[1.0] * 16, [-1.0] * 16]) * torch.arange(16) / 8)
    return job, phases, engines, data.training, data.evaluation


def owners(dataset: Dataset) -> list[set[int]]:
    """The patients whose words stand in each unit."""
    place = {word: 11 + index for index, word in enumerate(FILLER)}
    names = {(place[FILLER[p // 6]], place[FILLER[p % 6]]): p for p in range(PATIENTS)}
    found = [names[int(ids[1]), int(ids[2])] for ids in dataset.examples.sequences["input_ids"]]
    return [{found[row] for row in rows} for rows in dataset.rows_of_unit]


def without(dataset: Dataset, unit: int) -> Dataset:
    """Zero-out: the unit keeps its slot, and has no rows."""
    empty = np.empty(0, dtype=np.int64)
    rows = tuple(empty if index == unit else rows for index, rows in enumerate(dataset.rows_of_unit))
    return dataclasses.replace(dataset, rows_of_unit=rows)


# --- who is a unit ----------------------------------------------------------------------------------------------------


def test_no_patient_is_on_both_sides_of_the_split(tmp_path: Path, base: Path) -> None:
    *_, training, held_out = loaded(made_job(tmp_path / "job", base))
    assert held_out is not None
    sides = [[patient for patients in owners(side) for patient in patients] for side in (training, held_out)]
    assert [len(side) for side in sides] == [PATIENTS - 5, 5]
    assert sorted(sides[0] + sides[1]) == list(range(PATIENTS)), "each patient is one unit, on one side"
    rows = [len(side.examples) for side in (training, held_out)]
    assert sum(rows) == len(table()[0])
    for side in (training, held_out):
        assert sorted(row for rows in side.rows_of_unit for row in rows) == list(range(len(side.examples)))
        assert [side.unit_of_row[row] for rows in side.rows_of_unit for row in rows] == [
            unit for unit, rows in enumerate(side.rows_of_unit) for _ in rows
        ]


def test_a_neighbour_keeps_every_slot_and_every_other_units_rows(tmp_path: Path, base: Path) -> None:
    """Patient 0 with one row and with thirty, all rows in another order: the same split, the same rows of others."""
    sides = []
    for name, made in (("many", table()), ("one", table(large=1, shuffled=3))):
        *_, training, held_out = loaded(made_job(tmp_path / name, base, table=made))
        assert held_out is not None
        sides.append((training, held_out))
    assert [owners(side) for side in sides[0]] == [owners(side) for side in sides[1]]
    for many, one in zip(*sides, strict=True):
        for unit, patients in enumerate(owners(many)):
            texts = [
                sorted(tuple(side.examples.sequences["input_ids"][row]) for row in side.rows_of_unit[unit])
                for side in (many, one)
            ]
            assert (texts[0] == texts[1]) == (patients != {0})


@pytest.mark.parametrize("broken", ["count", "missing", "no_column"])
def test_units_other_than_planned_are_refused(tmp_path: Path, base: Path, broken: str) -> None:
    made = made_job(tmp_path / "job", base)
    path = made.folder / "data/training.parquet"
    content = pq.read_table(path)
    names: list[str | None] = content.column("patient").to_pylist()
    names[3] = "p99" if broken == "count" else None
    content = content.drop(["patient"])
    if broken != "no_column":
        content = content.append_column("patient", pa.array(names, pa.string()))
    pq.write_table(content, path)
    with pytest.raises(TrainerFailure) as caught:
        run(made.folder, KEY, Control(None))
    assert caught.value.code == "data_mismatch"


# --- what a step sums -------------------------------------------------------------------------------------------------


def flat(made: MadeJob) -> MadeJob:
    """The same job with gradients clipped to CLIP."""
    parts = tuple(
        dataclasses.replace(part, clipping="flat", max_grad_norm=CLIP) if isinstance(part, SampledGaussian) else part
        for part in made.spec.plan.parts
    )
    return MadeJob(made.folder, dataclasses.replace(made.spec, plan=dataclasses.replace(made.spec.plan, parts=parts)))


class Sums:
    """Clipped sums of the last phase over all units, without noise."""

    def __init__(self, made: MadeJob) -> None:
        self.job, phases, engines, self.training, _ = loaded(made)
        self.prepared, self.engine = phases[-1], engines[-1]
        for parameter in self.job.model.parameters():
            parameter.requires_grad_(False)
        for parameter in self.prepared.parameters.values():
            parameter.requires_grad_(True)
        pooled = pooled_vectors(self.job, self.training) if self.prepared.on_features else None
        self.features = None if pooled is None else pooled_features(self.job, pooled)

    def batches(self, dataset: Dataset, step: int) -> Iterator[tuple[Any, Tensor]]:
        units = np.arange(dataset.num_units)
        return loop.micro_batches(self.job, self.prepared, dataset, self.features, units, step)

    def __call__(self, dataset: Dataset, step: int = 0) -> dict[str, Tensor]:
        self.engine.reset()
        for batch, unit_index in self.batches(dataset, step):
            self.engine.accumulate(batch, unit_index)
        prefix = f"{self.job.family.head}." if self.prepared.on_features else ""
        return {prefix + name: value.clone() for name, value in self.engine.take().items()}


def gradients_by_hand(sums: Sums, made: MadeJob) -> list[dict[str, Tensor]]:
    """Mean gradient of each training patient, from the file's own columns, one row and one backward at a time."""
    content = pq.read_table(made.folder / "data/training.parquet").to_pydict()
    tokenizer = AutoTokenizer.from_pretrained(made.spec.base.path)
    kept = {patient for patients in owners(sums.training) for patient in patients}
    names, parameters = list(sums.prepared.parameters), list(sums.prepared.parameters.values())
    by_patient: dict[str, list[tuple[Tensor, ...]]] = {}
    device = sums.job.device.torch_device
    for text, label, patient in zip(content["review"], content["mood"], content["patient"], strict=True):
        if int(patient[1:]) in kept:
            logits = sums.job.model(**tokenizer(text, return_tensors="pt").to(device)).logits
            loss = F.cross_entropy(logits, torch.tensor([LABELS.index(label)], device=device))
            by_patient.setdefault(patient, []).append(torch.autograd.grad(loss, parameters))
    return [
        {name: torch.stack([row[index] for row in rows]).mean(0) for index, name in enumerate(names)}
        for rows in by_patient.values()
    ]


@pytest.mark.parametrize("adaptation", ["head", "lora"])
def test_a_units_gradient_is_the_mean_of_its_rows_clipped_once(tmp_path: Path, base: Path, adaptation: str) -> None:
    """L at unit level, where the bound leaves nothing out."""
    made = flat(made_job(tmp_path / "job", base, adaptation=adaptation, bound=LARGE, evaluation="none"))
    sums = Sums(made)
    gradients = gradients_by_hand(sums, made)
    assert len(gradients) == sums.training.num_units == PATIENTS
    assert min(norm(gradient) for gradient in gradients) > 0.0
    assert max(norm(gradient) for gradient in gradients) > CLIP, "something is clipped"
    assert distance(sums(sums.training), clipped_sum(gradients, CLIP)) <= 2e-3 * CLIP * len(gradients)


@pytest.mark.parametrize("adaptation", ["head", "lora"])
def test_zeroing_a_unit_moves_the_clipped_sum_by_at_most_its_bound(tmp_path: Path, base: Path, adaptation: str) -> None:
    """S at unit level: all thirty rows of patient 0 together move it no further than one row of another's."""
    sums = Sums(flat(made_job(tmp_path / "job", base, adaptation=adaptation, evaluation="none")))
    for step in range(3):
        whole = sums(sums.training, step)
        moved = [distance(whole, sums(without(sums.training, unit), step)) for unit in range(PATIENTS)]
        assert max(moved) <= CLIP * (1.0 + TOLERANCE)
        assert max(moved) >= 0.9 * CLIP
        assert min(moved) > 0.0
    assert owners(sums.training)[0] == {0}


def test_a_step_takes_no_more_rows_of_a_unit_than_declared_and_other_ones_each_time(tmp_path: Path, base: Path) -> None:
    sums = Sums(made_job(tmp_path / "job", base, evaluation="none"))
    seen: set[tuple[float, ...]] = set()
    chosen = []
    for step in range(12):
        counts: Counter[int] = Counter()
        for batch, unit_index in sums.batches(sums.training, step):
            counts.update(unit_index.tolist())
            seen |= {tuple(row) for row in batch["features"][unit_index == 0].tolist()}
            chosen.append(batch["features"][unit_index == 0])
        assert dict(counts) == {unit: min(BOUND, len(rows)) for unit, rows in enumerate(sums.training.rows_of_unit)}
    assert len(sums.training.rows_of_unit[0]) == LARGE
    assert sums.features is not None
    distinct = len({tuple(row) for row in sums.features.of_rows(sums.training.rows_of_unit[0])["features"].tolist()})
    assert BOUND < len(seen) <= distinct
    assert not all(torch.equal(chosen[0], other) for other in chosen)


def test_the_choice_of_one_unit_does_not_move_anothers(tmp_path: Path, base: Path) -> None:
    sums = Sums(made_job(tmp_path / "job", base, evaluation="none", bound=1))
    for step in range(3):
        rows = [
            {
                int(unit): row.tolist()
                for batch, index in sums.batches(dataset, step)
                for row, unit in zip(batch["features"], index, strict=True)
            }
            for dataset in (sums.training, without(sums.training, 0))
        ]
        assert {unit: row for unit, row in rows[0].items() if unit != 0} == rows[1]


# --- what is released once --------------------------------------------------------------------------------------------


def test_the_centre_counts_each_unit_once(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_job(tmp_path / "job", base, evaluation="none")
    job, phases, _, training, _ = loaded(made)
    pooled = pooled_vectors(job, training)
    totals: list[Tensor] = []

    def release(randomness: object, part: GaussianRelease, total: Tensor, *, tolerance: float) -> Tensor:
        totals.append(total.clone())
        return total

    monkeypatch.setattr(loop, "gaussian_release", release)
    unit_vectors = F.normalize(pooled.double(), dim=1)
    expected = sum(unit_vectors[rows].mean(0) for rows in training.rows_of_unit)
    loop._centre(job, training, pooled, State())
    torch.testing.assert_close(totals[0], expected, rtol=0, atol=1e-5)
    for unit in range(training.num_units):
        kept = np.concatenate([rows for rows in without(training, unit).rows_of_unit])
        less = dataclasses.replace(training, unit_of_row=training.unit_of_row[kept])
        loop._centre(job, less, pooled[torch.from_numpy(kept)], State())
        moved = float((totals[0] - totals[-1]).norm())
        assert 0.1 < moved <= 1.0 + 1e-9
    assert phases[0].phase.name != CENTRING


def test_a_unit_counts_once_among_the_metrics(tmp_path: Path, base: Path) -> None:
    """Cells that add up to one for each patient, whatever they are: the sensitivity of the release."""
    data, units = table()
    made = made_job(tmp_path / "job", base, validation=data, validation_units=units)
    job, *_, validation = loaded(made)
    assert validation is not None
    assert validation.num_units == PATIENTS
    counts = evaluate.sums(job, validation)[0]
    assert float(counts.sum()) == pytest.approx(PATIENTS)
    for unit in range(PATIENTS):
        rows = np.concatenate([rows for rows in without(validation, unit).rows_of_unit])
        examples = validation.examples.select(rows)
        less = Dataset(examples, without(validation, unit).rows_of_unit, validation.unit_of_row[rows])
        moved = counts - evaluate.sums(job, less)[0]
        assert float(moved.sum()) == pytest.approx(1.0)
        assert float(moved.norm()) <= 1.0 + 1e-9
        assert float(moved.min()) >= -1e-9


# --- a whole job ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptation", ["head", "bitfit"])
def test_a_job_on_persons(tmp_path: Path, base: Path, adaptation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the folder to the bundle; the exact metrics are recomputed here, from the exported model."""
    seen: list[tuple[Dataset, Tensor]] = []
    exact = evaluate.sums

    def counting(job: Job, dataset: Dataset) -> tuple[Tensor, float | None]:
        totals, loss = exact(job, dataset)
        seen.append((dataset, totals.view(2, 2)))
        return totals, loss

    monkeypatch.setattr(evaluate, "sums", counting)
    made = made_job(tmp_path / "job", base, adaptation=adaptation)
    run(made.folder, KEY, Control(None))
    got = made.metrics()
    assert (got["released"], got["num_units"], got["averaged_over"]) == ("private", 5, "units")
    card = (made.folder / "results/model/README.md").read_text()
    assert "all records with the same `patient`, together, among 11 units" in card
    assert "at most 4 records of a unit" in card
    assert "5 units;" in card
    assert "over units" in card

    ((dataset, counts),) = seen
    evaluated = {patient for patients in owners(dataset) for patient in patients}
    bundle = made.folder / "results/model"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(bundle), AutoTokenizer.from_pretrained(bundle)
    expected = torch.zeros(2, 2, dtype=torch.float64)
    data, units = table()
    sizes = Counter(units)
    for (text, label), patient in zip(data, units, strict=True):
        if int(patient[1:]) in evaluated:
            with torch.no_grad():
                predicted = int(model(**tokenizer(text, return_tensors="pt")).logits.argmax())
            expected[LABELS.index(label), predicted] += 1 / sizes[patient]
    torch.testing.assert_close(counts, expected)


def test_a_large_unit_needs_no_more_memory_where_units_need_not_stay_together(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made_job(tmp_path / "job", base, tokens=40)
    sizes: list[int] = []
    batches = Job.shared_batches

    def watched(*arguments: Any) -> Iterator[Any]:
        for chosen, batch in batches(*arguments):
            sizes.append(batch["input_ids"].numel())
            yield chosen, batch

    monkeypatch.setattr(Job, "shared_batches", watched)
    run(made.folder, KEY, Control(None))
    assert sizes
    assert max(sizes) <= 40


def test_the_order_of_the_rows_does_not_matter_but_for_rounding(tmp_path: Path, base: Path) -> None:
    """Where the bound leaves nothing out, a job is a function of what each patient's rows are."""
    weights = []
    for name, shuffled in (("a", 0), ("b", 5)):
        made = made_job(tmp_path / name, base, table=table(shuffled=shuffled), bound=LARGE)
        run(made.folder, KEY, Control(None))
        weights.append(load_file(made.folder / "results/model/model.safetensors")["classifier.weight"])
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)
