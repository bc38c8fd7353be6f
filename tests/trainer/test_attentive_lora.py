"""LoRA behind an attentive head: what moves, gradients of scores and factors against a loop over units, the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForSequenceClassification

from app.catalog.adaptations import AttentiveHead, AttentiveLora
from app.catalog.recipes import HEAD_PHASE, MAIN_PHASE, Phase
from tests.trainer.dp.checks import check_loop
from tests.trainer.jobs import KEY, LABELS, make_job, rows
from worker.trainer import loop
from worker.trainer.adaptations.registry import ADAPTERS
from worker.trainer.control import Control
from worker.trainer.dp.book_keeping import BookKeepingEngine
from worker.trainer.families.encoder import EncoderFamily
from worker.trainer.families.registry import FAMILIES
from worker.trainer.features import Features
from worker.trainer.run import run
from worker.trainer.spec import TaskSpec

TASK = TaskSpec("text_classification", {"text": "review", "label": "mood"}, LABELS, max_length=16)
LORA = AttentiveLora(1, rank=2, alpha=4.0)
MATRICES = {
    f"encoder.layer.0.{name}.weight"
    for name in (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
}


def _phases(head: int, main: int, rate: float = 1e-2) -> tuple[Phase, ...]:
    return (
        Phase(HEAD_PHASE, AttentiveHead(1), 0.5, head, 0.05, 0.2, averaging=0.9, noise_ratio=1.6),
        Phase(MAIN_PHASE, LORA, 0.5, main, rate, rate, averaging=0.9, num_warmup_steps=1),
    )


@pytest.mark.parametrize("name", ["bert", "roberta"])
@pytest.mark.parametrize("units", [[0, 1, 2, 3, 4, 5], [4, 7, 7, 4, 7, 3]], ids=["rows", "units"])
def test_clipped_sums_are_those_of_a_loop_over_units(
    request: pytest.FixtureRequest, name: str, units: list[int]
) -> None:
    family = FAMILIES[name]["sequence_classification"]
    model = family.load(request.getfixturevalue("base" if name == "bert" else "roberta_base"), TASK, num_layers=1)
    names = [*ADAPTERS["attentive_lora"].parameters(model, family, LORA), *family.head_parameters(model)]
    parameters = dict(model.double().named_parameters())
    model.requires_grad_(False)
    for seed, each in enumerate(names):  # all start at zero
        noise = torch.randn(parameters[each].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        parameters[each].data = 0.3 * noise
        parameters[each].requires_grad_(True)
    lengths = torch.tensor([9, 7, 5, 4, 3, 2])
    mask = (torch.arange(9) < lengths[:, None]).long()
    ids = torch.randint(5, 17, (6, 9), generator=torch.Generator().manual_seed(1)) * mask
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 0, 1, 1, 0])}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(logits, batch["labels"], reduction="none")

    assert len(names) == 1 + len(MATRICES) + 2
    check_loop(BookKeepingEngine, model, names, loss, batch, torch.tensor(units), 1e-10)


@pytest.mark.parametrize("private", [True, False], ids=["private", "plain"])
def test_every_matrix_of_the_blocks_that_it_reads_moves_and_nothing_else(
    tmp_path: Path, base: Path, private: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[Features | None] = []
    batches = loop.micro_batches

    def noted(*given: Any) -> Any:
        held.append(given[3])
        return batches(*given)

    monkeypatch.setattr(loop, "micro_batches", noted)
    evaluation: Any = "private" if private else "public"
    made: dict[str, Any] = {"private": private, "evaluation": evaluation}
    job = make_job(tmp_path / "job", base, phases=_phases(3, 4), noise=0.5, **made)
    run(job.folder, KEY, Control(None))
    assert [features is None for features in held] == [False] * 3 + [True] * 4, "states of the rows that nothing reads"
    assert job.metrics()["released"] == evaluation
    model = AutoModelForSequenceClassification.from_pretrained(job.folder / "results/model")
    assert model.config.num_hidden_layers == 2
    trained, before = model.state_dict(), AutoModel.from_pretrained(base).state_dict()
    kept = {name: value for name, value in before.items() if name.startswith(("embeddings.", "encoder.layer.0."))}
    moved = {name for name, value in kept.items() if not torch.equal(trained[f"bert.{name}"], value)}
    assert moved == MATRICES
    for name in MATRICES:
        change = trained[f"bert.{name}"].double() - before[name].double()
        values = torch.linalg.svdvals(change)
        assert float(values[LORA.rank]) < 1e-5 < float(values[0])
    key = trained["bert.encoder.layer.1.attention.self.key.weight"]
    assert np.flatnonzero(key.abs().sum(1)).tolist() == [0, 8]


def test_it_learns_privately(tmp_path: Path, base: Path) -> None:
    data, validation = rows(400), rows(90)[::-1]
    made: dict[str, Any] = {"data": data, "validation": validation, "evaluation": "public"}
    job = make_job(tmp_path / "job", base, phases=_phases(10, 40), **made)
    run(job.folder, KEY, Control(None))
    assert job.metrics()["accuracy"] > 0.8


def test_an_attempt_that_goes_on_has_the_same_frozen_factors(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in no checkpoint, and another version of a library may draw more before them."""
    whole, cut = (make_job(tmp_path / name, base, phases=_phases(2, 5)) for name in ("whole", "cut"))
    run(whole.folder, KEY, Control(None))
    control, batches, graft, steps = Control(None), loop.micro_batches, EncoderFamily._graft, []

    def stopping(*given: Any) -> Any:
        steps.append(given[-1])
        if len(steps) == 5:
            control._stop.set()
        return batches(*given)

    def drawing(*given: Any) -> None:
        torch.rand(3)
        graft(*given)

    monkeypatch.setattr(loop, "micro_batches", stopping)
    run(cut.folder, KEY, control)
    assert not (cut.folder / "results/model").exists()
    (checkpoint,) = (cut.folder / "checkpoints").iterdir()
    checkpoint.rename(cut.folder / "resume")  # as the supervisor does
    monkeypatch.setattr(EncoderFamily, "_graft", drawing)
    run(cut.folder, KEY, Control(None))
    assert steps == [0, 1, 0, 1, 2, 3, 4]
    one, other = (load_file(job.folder / "results/model/model.safetensors") for job in (whole, cut))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
