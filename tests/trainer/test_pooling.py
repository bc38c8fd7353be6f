"""The pooling layer against mean pooling, normalising and centring computed by hand in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from tests.trainer.jobs import KEY, LABELS, NUM_HELD_OUT, NUM_ROWS, make_job
from worker.trainer import loop
from worker.trainer.checkpoint import State
from worker.trainer.control import Control
from worker.trainer.dp.release import gaussian_release
from worker.trainer.dp.sampler import split_units
from worker.trainer.families.bert import BERT
from worker.trainer.families.encoder import RESIDUAL_SCALE
from worker.trainer.families.registry import FAMILIES
from worker.trainer.run import run
from worker.trainer.spec import TaskSpec

TASK = TaskSpec("text_classification", {"text": "review", "label": "mood"}, LABELS, max_length=16)


def _inputs() -> tuple[Tensor, Tensor]:
    ids = torch.randint(5, 17, (6, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) < torch.tensor([9, 7, 5, 4, 3, 2])[:, None]).long()
    return ids * mask, mask


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=1, keepdim=True)


def _standard(vectors: Tensor) -> Tensor:
    """Unit vectors orthogonal to (1, …, 1): LayerNorm over √width."""
    return _unit(vectors - vectors.mean(1, keepdim=True))


def _by_hand(base: Path, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors, and centred features, from the base alone, in float64."""
    ids, mask = _inputs()
    model = AutoModel.from_pretrained(base).double()
    model.train(False)
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    weight = mask.double()[:, :, None]
    mean = (hidden * weight).sum(1) / weight.sum(1)
    pooled = _standard(mean + hidden[:, 0] / RESIDUAL_SCALE)
    # The first token's own residual is all that is left of it.
    assert float((pooled * _standard(mean)).sum(1).min()) > 0.99999
    return pooled, torch.tanh(_standard(pooled - centre.double()))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_pooling_is_mean_normalise_centre_normalise(request: pytest.FixtureRequest, family: str) -> None:
    base = request.getfixturevalue("base" if family == "bert" else "roberta_base")
    parts = FAMILIES[family]["sequence_classification"]
    model = parts.load(base, TASK)
    centre = 0.3 * torch.randn(16, generator=torch.Generator().manual_seed(2)) / 4
    pooled, features = _by_hand(base, centre)
    ids, mask = _inputs()
    with torch.no_grad():
        parts.set_centre(model, centre)
        got = parts.pooled(model, {"input_ids": ids, "attention_mask": mask})
        torch.testing.assert_close(got.double() / 4, pooled, rtol=0, atol=2e-5)
        torch.testing.assert_close(parts.features(model, got).double(), features, rtol=0, atol=5e-5)
        # The whole model reads the same features: with an identity for a head, its logits are they.
        head = parts.head_module(model)
        head.weight = torch.nn.Parameter(torch.eye(16))
        head.bias = torch.nn.Parameter(torch.zeros(16))
        logits = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits.double(), features, rtol=0, atol=5e-5)
    assert float(logits.norm(dim=1).max()) <= 1.0


def test_padding_and_neighbours_do_not_reach_a_row(base: Path) -> None:
    model = BERT.load(base, TASK)
    ids, mask = _inputs()
    with torch.no_grad():
        together = BERT.pooled(model, {"input_ids": ids, "attention_mask": mask})
        alone = BERT.pooled(model, {"input_ids": ids[3:4, :4], "attention_mask": mask[3:4, :4]})
    torch.testing.assert_close(together[3:4], alone, rtol=0, atol=2e-4)


def test_the_centre_is_the_released_mean_of_unit_vectors(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def release(randomness: object, part: object, total: Tensor, *, tolerance: float) -> Tensor:
        assert tolerance == 1e-3  # as for gradients
        seen.append(total.clone())
        seen.append(gaussian_release(randomness, part, total, tolerance=tolerance))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(loop, "gaussian_release", release)
    states: list[State] = []
    train = loop.train

    def noting(*arguments: object) -> None:
        states.append(arguments[-1])  # type: ignore[arg-type]
        train(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("worker.trainer.run.train", noting)
    job = make_job(tmp_path / "job", base)
    run(job.folder, KEY, Control(None))
    total, noised = (each.cpu() for each in seen)
    assert float(total.norm()) <= NUM_ROWS - NUM_HELD_OUT
    assert states[0].tensors["centre"].tolist() == (noised / (NUM_ROWS - NUM_HELD_OUT)).float().tolist()
    # Independently: the mean over the split's training rows only, from the base in float64.
    from worker.trainer.dp.randomness import JobRandomness

    kept = split_units(JobRandomness(KEY), num_units=NUM_ROWS, num_held_out=NUM_HELD_OUT).training
    expected = _sum_of_unit_vectors(base, job.folder, kept.tolist())
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-3)
    # Noise of σ = 5 over a sensitivity of 1: 16 coordinates.
    assert 2.5 < float((noised - total).std()) < 8.0


def _sum_of_unit_vectors(base: Path, folder: Path, kept: list[int]) -> Tensor:
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    texts = pq.read_table(folder / "data/training.parquet").column("review").to_pylist()
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModel.from_pretrained(base).double()
    model.train(False)
    total = torch.zeros(16, dtype=torch.float64)
    for index in kept:
        with torch.no_grad():
            hidden = model(**tokenizer(texts[index], return_tensors="pt")).last_hidden_state[0]
        total += _standard((hidden.mean(0) + hidden[0] / RESIDUAL_SCALE)[None])[0]
    return total


def test_one_row_moves_the_centre_by_at_most_its_sensitivity(base: Path) -> None:
    model = BERT.load(base, TASK)
    ids, mask = _inputs()
    with torch.no_grad():
        pooled = BERT.pooled(model, {"input_ids": ids, "attention_mask": mask})
    pooled[0] *= 1e30  # whatever a row does to its vector
    pooled[1] = float("nan")
    bounded = loop.bounded_rows(pooled / 4, 1.0)
    assert float(bounded.norm(dim=1).max()) <= 1.0 + 1e-12
    assert not bounded[1].any()
