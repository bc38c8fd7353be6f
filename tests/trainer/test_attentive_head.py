"""An attentive head against the base alone, in float64, and the whole model; kept states against those that are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, BertModel

from app.catalog.adaptations import AttentiveHead
from app.catalog.recipes import HEAD_PHASE, Phase
from tests.trainer.jobs import FILLER, GOOD, KEY, LABELS, NUM_HELD_OUT, NUM_ROWS, MadeJob, make_job, rows
from worker.trainer import loop
from worker.trainer.adaptations.registry import ADAPTERS
from worker.trainer.control import Control
from worker.trainer.dp.book_keeping import BookKeepingEngine
from worker.trainer.families.attention import AttentiveHead as Attention
from worker.trainer.families.encoder import EncoderFamily
from worker.trainer.families.interface import AttentiveFamily, PooledFamily
from worker.trainer.families.registry import FAMILIES, family_for
from worker.trainer.run import run
from worker.trainer.spec import TaskSpec

TASK = TaskSpec("text_classification", {"text": "review", "label": "mood"}, LABELS, max_length=16)
MASK = (torch.arange(9) < torch.tensor([9, 7, 5, 4, 3, 2])[:, None]).long()
IDS = torch.randint(5, 17, (6, 9), generator=torch.Generator().manual_seed(1)) * MASK
BATCH = {"input_ids": IDS, "attention_mask": MASK}
PHASE = Phase(HEAD_PHASE, AttentiveHead(1), 0.5, 4, 0.1, 0.2, averaging=0.9)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _attended(base: Path, family: EncoderFamily, num_layers: int | None = 1) -> nn.Module:
    """A model with random scores, centre and head."""
    model = family.load(base, TASK, num_layers=num_layers)
    (name,) = ADAPTERS["attentive_head"].parameters(model, family, AttentiveHead(1))
    family.set_centre(model, 0.3 * _random(16) / 4)
    with torch.no_grad():
        model.get_parameter(name).copy_(3.0 * _random(1, 16))
        for parameter in family.head_module(model).parameters():
            parameter.copy_(_random(*parameter.shape))
    return model


def _unit(vectors: Tensor) -> Tensor:
    """What LayerNorm over √width makes of them."""
    vectors = vectors - vectors.mean(1, keepdim=True)
    return vectors / vectors.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_logits_are_those_of_a_weighted_mean_of_the_first_blocks_tokens(
    request: pytest.FixtureRequest, name: str
) -> None:
    base = request.getfixturevalue("base" if name == "bert" else "roberta_base")
    family = FAMILIES[name]["sequence_classification"]
    model = _attended(base, family)
    plain = AutoModel.from_pretrained(base).double().train(False)
    with torch.no_grad():
        hidden = plain(**BATCH, output_hidden_states=True).hidden_states[1]  # behind the first of two blocks
        scores = hidden @ (3.0 * _random(1, 16)[0].double()) / 4.0
        weights = scores.masked_fill(MASK == 0, -torch.inf).softmax(1)
        mean = (weights[:, :, None] * hidden).sum(1)
        centred = _unit(_unit(mean + hidden[:, 0] / 1024) - 0.3 * _random(16).double() / 4)
        head = family.head_module(model).double()
        expected = head(torch.tanh(centred))
        head.float()
        whole = model(**BATCH).logits
        kept = family.attentive_head(model)(family.states(model, BATCH), MASK)
        ADAPTERS["attentive_head"].merge(model)
        merged = model(**BATCH).logits
    assert model.config.num_hidden_layers == 2
    assert float((weights.max(1).values - 1 / MASK.sum(1)).max()) > 0.2  # far from a plain mean
    for got in (whole, kept, merged):
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-4)


def test_at_first_it_pools_as_before_and_a_bundle_keeps_its_scores(tmp_path: Path, base: Path) -> None:
    family = FAMILIES["bert"]["sequence_classification"]
    model = family.load(base, TASK, num_layers=1)
    with torch.no_grad():
        before = family.pooled(model, BATCH)
        family.attend(model)
        torch.testing.assert_close(family.pooled(model, BATCH), before)
        model = _attended(base, family)
        answers = model(**BATCH).logits
        ADAPTERS["attentive_head"].merge(model)
        model.save_pretrained(tmp_path)
        again = family.load(tmp_path, TASK, num_layers=1)  # a base of this service's keeps all blocks
        family.attend(again)
        assert again.config.num_hidden_layers == 2
        torch.testing.assert_close(again(**BATCH).logits, answers)
        states = family.states(again, BATCH)
        torch.testing.assert_close(family.attentive_head(again)(states, MASK), answers, rtol=0, atol=1e-4)


def test_every_family_of_encoders_has_one() -> None:
    for name, tasks in FAMILIES.items():
        for family in tasks.values():
            if isinstance(family, EncoderFamily):
                assert isinstance(family_for(name, "text_classification"), AttentiveFamily)
            elif isinstance(family, PooledFamily):
                assert not isinstance(family, AttentiveFamily)


def _bundle(job: MadeJob) -> dict[str, Tensor]:
    model = AutoModelForSequenceClassification.from_pretrained(job.folder / "results/model")
    assert model.config.num_hidden_layers == 2
    return model.state_dict()


@pytest.mark.parametrize("units", [None, [f"p{row // 3}" for row in range(NUM_ROWS)]], ids=["records", "patients"])
def test_what_is_not_kept_is_computed_again_to_the_same_effect(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, units: list[str] | None
) -> None:
    passes, bundles, chosen = [], [], []
    forward, make_engine = BertModel.forward, loop.make_engine

    def counted(*inputs: object, **named: object) -> object:
        passes[-1] += 1
        return forward(*inputs, **named)

    def noting(*inputs: object, **named: object) -> object:
        chosen.append(make_engine(*inputs, **named))
        return chosen[-1]

    monkeypatch.setattr(BertModel, "forward", counted)
    monkeypatch.setattr(loop, "make_engine", noting)
    for most in (1 << 30, 4 * 16 * 100, 0):
        monkeypatch.setattr("worker.trainer.features.MOST_FEATURE_BYTES", most)
        passes.append(0)
        job = make_job(
            tmp_path / f"{most}",
            base,
            phases=(PHASE,),
            units=units,
            num_held_out=NUM_HELD_OUT if units is None else 4,
        )
        run(job.folder, KEY, Control(None))
        bundles.append(_bundle(job))
    assert passes[0] < min(passes[1:])
    assert all(isinstance(engine, BookKeepingEngine) for engine in chosen)
    kept, *others = bundles
    assert float(kept["bert.encoder.layer.1.attention.self.key.weight"].abs().max()) > 0.01
    for name, value in kept.items():
        for again in others:
            torch.testing.assert_close(again[name], value, atol=2e-4, rtol=1e-3, msg=name)


def test_a_stop_is_heard_while_vectors_are_weighed(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows are not kept, that is a pass of the body over all of them."""
    control, weighed, weighing = Control(None), [], loop.attended_vectors
    pooled = Attention.pooled

    def noted(*inputs: Tensor) -> Tensor:
        weighed.append(len(inputs[1]))
        return pooled(*inputs)

    def stopped_meanwhile(*inputs: Any) -> Tensor:
        monkeypatch.setattr(Attention, "pooled", lambda *given: control._stop.set() or noted(*given))
        return weighing(*inputs)

    monkeypatch.setattr(loop, "attended_vectors", stopped_meanwhile)
    job = make_job(tmp_path / "job", base, phases=(PHASE,), tokens=64)
    run(job.folder, KEY, control)
    assert len(weighed) == 1
    assert not (job.folder / "results/model").exists()


def test_a_private_job_is_one_phase_of_the_plan_and_moves_nothing_else(tmp_path: Path, base: Path) -> None:
    job = make_job(tmp_path / "job", base, phases=(PHASE,), noise=0.5)
    run(job.folder, KEY, Control(None))
    assert job.metrics()["released"] == "private"
    trained, before = _bundle(job), AutoModel.from_pretrained(base).state_dict()
    for name, value in before.items():
        if name.startswith(("embeddings.", "encoder.layer.0.")):
            assert torch.equal(trained[f"bert.{name}"], value), name
    key = trained["bert.encoder.layer.1.attention.self.key.weight"]
    assert np.flatnonzero(key.abs().sum(1)).tolist() == [0, 8]  # the first row of each of two heads, one and the same
    assert torch.equal(key[0], key[8])


def test_it_learns_privately(tmp_path: Path, base: Path) -> None:
    phase = Phase(HEAD_PHASE, AttentiveHead(1), 0.5, 60, 0.05, 0.2, averaging=0.9)
    data, validation = rows(400), rows(90)[::-1]
    job = make_job(tmp_path / "job", base, phases=(phase,), data=data, validation=validation, evaluation="public")
    run(job.folder, KEY, Control(None))
    assert job.metrics()["accuracy"] > 0.8


def test_numbers_of_pairs_are_learnt_privately_and_the_bundle_says_the_same(tmp_path: Path, base: Path) -> None:
    """Every third pair is cut at the longest sequence. The metrics are those of plain transformers' answers."""
    columns, most = {"text": "a", "text_pair": "b", "target": "c"}, 12
    task = TaskSpec("text_regression", columns, (), max_length=most, options={"range": [10.0, 50.0]})
    phase = Phase(HEAD_PHASE, AttentiveHead(1), 0.5, 60, 0.05, 0.05, averaging=0.9)
    data, validation = rows(500), rows(90)[::-1]
    made = {"phases": (phase,), "data": data, "validation": validation, "evaluation": "public", "task": task}
    job, tables = make_job(tmp_path / "job", base, **made), {}
    for name, given in (("training", data), ("validation", validation)):
        texts = [text for text, _ in given]
        other = [" ".join(FILLER[: row % 5 + 1] * (1 + 3 * (row % 3 == 0))) for row in range(len(texts))]
        targets = ["50" if {*GOOD} & {*text.split()} else "10" for text in texts]
        tables[name] = {"a": texts, "b": other, "c": targets}
        pq.write_table(pa.table(tables[name]), job.folder / f"data/{name}.parquet")
    run(job.folder, KEY, Control(None))
    bundle, table = job.folder / "results/model", tables["validation"]
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(bundle), AutoTokenizer.from_pretrained(bundle)
    whole = [len(ids) for ids in tokenizer(table["a"], table["b"])["input_ids"]]
    assert min(whole) < most < max(whole)
    inputs = tokenizer(table["a"], table["b"], truncation=True, max_length=most, padding=True, return_tensors="pt")
    with torch.no_grad():
        answers = model(**inputs).logits[:, 0].clamp(10.0, 50.0).double().numpy()
    targets = np.array([float(each) for each in table["c"]])
    got = job.metrics()
    assert got["rmse"] == pytest.approx(float(np.sqrt(np.mean((answers - targets) ** 2))), rel=1e-4)
    assert got["correlation"] == pytest.approx(float(np.corrcoef(answers, targets)[0, 1]), rel=1e-3)
    assert got["correlation"] > 0.7
