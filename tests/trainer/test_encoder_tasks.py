"""Every task on encoders, from a job folder to a bundle, and its loss and statistics against independent figures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn import metrics as oracle
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertForMaskedLM,
    BertModel,
)

from app.catalog.memory import MOST_FEATURE_BYTES
from app.catalog.recipes import HEAD_PHASE, MAIN_PHASE, Phase
from app.catalog.tasks import TASKS
from tests.trainer.dp.checks import distance
from tests.trainer.dp.oracles import clipped_sum, norm
from tests.trainer.encoders import MASKED, REGRESSION, SPECS, TOKENS, make_encoder_base, toy_table
from tests.trainer.jobs import ADAPTATIONS, KEY, MadeJob, as_its_card_says, make_job, rows
from worker.trainer import loop
from worker.trainer.control import Control
from worker.trainer.data import load_data
from worker.trainer.device import set_up_device
from worker.trainer.dp.randomness import JobRandomness
from worker.trainer.failure import TrainerFailure
from worker.trainer.families.registry import family_for
from worker.trainer.features import token_features
from worker.trainer.job import adapt, load_job
from worker.trainer.messages import Message, Notice
from worker.trainer.run import run
from worker.trainer.tasks import entities
from worker.trainer.tasks.confusion import binary_cells, binary_metrics
from worker.trainer.tasks.interface import IGNORED
from worker.trainer.tasks.masked_lm import MaskedLanguageModeling
from worker.trainer.tasks.registry import TRAINER_TASKS
from worker.trainer.tasks.text_regression import TextRegression, regression_metrics

AUTO = {
    "pair": AutoModelForSequenceClassification,
    "multi": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
    "masked": AutoModelForMaskedLM,
}


def _job(
    folder: Path, base: Path, name: str, family: str, adaptation: str, steps: int = 3, rate: float = 1e-2, **how: Any
) -> MadeJob:
    task, count = SPECS[name], how.pop("count", 60)
    main = Phase(MAIN_PHASE, ADAPTATIONS[adaptation], 0.5, steps, rate, rate)
    phases = (main,) if TASKS[task.type].head == "pretrained" else (dataclasses.replace(main, name=HEAD_PHASE),)
    if adaptation != "head" and TASKS[task.type].head != "pretrained":
        head = Phase(HEAD_PHASE, ADAPTATIONS["head"], 0.5, 2, 1e-2, 1e-2)
        phases = (head, main)
    table = toy_table(name, count)
    data = [(text, "") for text in table["a"]]
    made = make_job(folder, base, family=family, task=task, phases=phases, data=data, **how)
    pq.write_table(pa.table(table), folder / "data/training.parquet")
    return made


@pytest.mark.parametrize("adaptation", ["lora", "full"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("name", SPECS)
def test_a_private_job_gives_a_bundle_that_plain_transformers_loads(
    tmp_path: Path, name: str, family: str, adaptation: str
) -> None:
    base = make_encoder_base(tmp_path / "base", name, family)
    job = _job(tmp_path / "job", base, name, family, adaptation)
    run(job.folder, KEY, Control(None))
    got = job.metrics()
    assert got["released"] == "private"
    task = TASKS[SPECS[name].type]
    assert {*got.get("not_released", ())} - {*task.metrics, "precision_micro", "recall_micro", "f1_micro"} == {
        *task.public_metrics
    }
    bundle = job.folder / "results/model"
    model, tokenizer = AUTO[name].from_pretrained(bundle), AutoTokenizer.from_pretrained(bundle)
    before = family_for(family, SPECS[name].type).load(base, SPECS[name])
    inputs = tokenizer("the film was great", return_tensors="pt")
    with torch.no_grad():
        assert not torch.allclose(model(**inputs).logits, before(**inputs).logits, atol=1e-4)
    long = "the film was great " * 40  # the base has 34 positions
    asked = {"pair": {"text": long, "text_pair": long}, "masked": f"the [MASK] {long}"}.get(name, long)
    told = as_its_card_says(bundle)([asked])
    assert len(told) == (5 if name == "masked" else 1)  # a pipeline's guesses at what is hidden
    assert name != "multi" or {each["label"] for each in told[0]} == {*SPECS[name].labels}


@pytest.mark.parametrize(
    ("name", "metric", "least"),
    [("pair", "accuracy", 0.9), ("multi", "f1_micro", 0.9), ("tokens", "f1_macro", 0.9), ("regression", "r2", 0.9)],
)
def test_without_noise_it_learns_the_task(tmp_path: Path, name: str, metric: str, least: float) -> None:
    base = make_encoder_base(tmp_path / "base", name, "bert")
    job = _job(
        tmp_path / "job",
        base,
        name,
        "bert",
        "full",
        steps=120,
        rate=1e-2,
        private=False,
        evaluation="public",
        count=120,
    )
    run(job.folder, KEY, Control(None))
    assert job.metrics()[metric] >= least


@pytest.mark.parametrize("adaptation", ["head", "lora"])
def test_a_head_on_tokens_learns_the_same_from_vectors_that_are_kept(
    tmp_path: Path, adaptation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_encoder_base(tmp_path / "base", "tokens", "bert")
    passes, bundles = [], []
    forward = BertModel.forward

    def counted(*inputs: Any, **named: Any) -> Any:
        passes[-1] += 1
        return forward(*inputs, **named)

    monkeypatch.setattr(BertModel, "forward", counted)
    for most in (MOST_FEATURE_BYTES, 4 * 16 * 100, 0):
        monkeypatch.setattr("worker.trainer.features.MOST_FEATURE_BYTES", most)
        passes.append(0)
        folder = tmp_path / f"job-{most}"
        job = _job(folder, base, "tokens", "bert", adaptation, steps=4, private=False, evaluation="public")
        run(job.folder, KEY, Control(None))
        bundles.append(AutoModelForTokenClassification.from_pretrained(job.folder / "results/model").state_dict())
    kept, *others = bundles
    assert passes[0] < passes[1]
    assert kept["classifier.weight"].abs().max() > 0.01
    for other in others:
        for name, value in other.items():
            torch.testing.assert_close(kept[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("most", [MOST_FEATURE_BYTES, 4 * 16 * 60, 0])
def test_a_persons_gradient_on_kept_vectors_is_the_whole_models_clipped_once(
    tmp_path: Path, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.trainer.features.MOST_FEATURE_BYTES", most)
    base = make_encoder_base(tmp_path / "base", "tokens", "bert")
    units = [f"p{row % 7}" for row in range(24)]
    made = _job(
        tmp_path / "job", base, "tokens", "bert", "head", count=24, units=units, evaluation="none", clipping="flat",
        max_records_per_unit=24,
    )  # fmt: skip
    path = made.folder / "data/training.parquet"
    pq.write_table(pq.read_table(path).append_column("patient", pa.array(units)), path)
    job = load_job(made.folder, KEY, Control(None), made.spec, set_up_device(made.spec.runtime))
    (prepared,) = phases = adapt(job)
    (engine,) = loop.make_engines(job, phases)
    training = load_data(made.folder, made.spec, job.task, job.randomness).training
    torch.manual_seed(1)
    with torch.no_grad():
        job.family.head_module(job.model).weight.normal_()
    loop.require_gradients(job, prepared)
    by_hand = []
    for rows_of_unit in training.rows_of_unit:
        losses = []
        for row in rows_of_unit:
            ids, tags = (
                torch.from_numpy(training.examples.sequences[name][row]).to(job.device.torch_device)
                for name in ("input_ids", "labels")
            )
            ids = ids[None]
            logits = job.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits[tags != IGNORED], tags[tags != IGNORED]))
        found = torch.autograd.grad(torch.stack(losses).mean(), list(prepared.parameters.values()))
        by_hand.append(
            {name.removeprefix("classifier."): g for name, g in zip(prepared.parameters, found, strict=True)}
        )
    bound = engine.max_grad_norm = sorted(map(norm, by_hand))[3]  # clips some of them
    features = token_features(job, training)
    assert (len(features.vectors) == training.examples.lengths.sum()) == (most == MOST_FEATURE_BYTES)
    engine.reset()
    for batch, unit in loop.micro_batches(job, prepared, training, features, np.arange(7), 0):
        engine.accumulate(batch, unit)
    assert distance(engine.take(), clipped_sum(by_hand, bound)) <= 2e-3 * bound * 7


class Told(Control):
    """Remembers what is told."""

    def __init__(self) -> None:
        super().__init__(None)
        self.messages: list[Message] = []

    def send(self, message: Message) -> None:
        self.messages.append(message)


def test_how_many_rows_a_person_has_does_not_show_in_how_a_head_on_tokens_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_encoder_base(tmp_path / "base", "tokens", "bert")
    monkeypatch.setattr("worker.trainer.features.MOST_FEATURE_BYTES", 4 * 16 * 16 * 30)
    told, drawn = [], []
    add_noise = JobRandomness.add_noise_

    def noise(*inputs: Any, **named: Any) -> None:
        drawn[-1].add(named["name"])
        add_noise(*inputs, **named)

    monkeypatch.setattr(JobRandomness, "add_noise_", noise)
    for count in (20, 60):
        units = [f"p{min(row, 9)}" for row in range(count)]  # the last of ten persons has all the rest
        job = _job(
            tmp_path / str(count), base, "tokens", "bert", "head", count=count, units=units, evaluation="none",
            num_held_out=0,
        )  # fmt: skip
        path = job.folder / "data/training.parquet"
        pq.write_table(pq.read_table(path).append_column("patient", pa.array(units)), path)
        control = Told()
        drawn.append(set())
        run(job.folder, KEY, control)
        told.append([message for message in control.messages if isinstance(message, Notice)])
    assert told[0] == told[1]
    assert drawn[0] == drawn[1]


def test_a_single_step_of_lora_without_noise_is_exported(tmp_path: Path) -> None:
    base = make_encoder_base(tmp_path / "base", "masked", "bert")
    job = _job(tmp_path / "job", base, "masked", "bert", "lora", steps=1, private=False, evaluation="public")
    run(job.folder, KEY, Control(None))  # its A has no gradient, as B is zero
    assert (job.folder / "results/model/model.safetensors").exists()


def test_a_regression_answers_in_the_targets_units(tmp_path: Path) -> None:
    base = make_encoder_base(tmp_path / "base", "regression", "bert")
    job = _job(
        tmp_path / "job", base, "regression", "bert", "full", steps=60, private=False, evaluation="public", count=120
    )
    run(job.folder, KEY, Control(None))
    bundle = job.folder / "results/model"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(bundle), AutoTokenizer.from_pretrained(bundle)
    assert model.config.num_labels == 1
    table = toy_table("regression", 120)
    with torch.no_grad():
        inputs = tokenizer(table["a"], return_tensors="pt", padding=True)
        errors = model(**inputs).logits[:, 0] - torch.tensor([float(cell) for cell in table["c"]])
    assert float(errors.abs().mean()) < 5.0  # of targets that are 10 and 50


def test_moments_give_scikit_learns_figures() -> None:
    random = np.random.default_rng(0)
    true = random.uniform(-1, 1, 400)
    predicted = np.clip(0.8 * true + 0.2 * random.normal(size=400), -1, 1)
    task = TextRegression.__new__(TextRegression)
    batch = {"targets": torch.from_numpy(true)}
    statistics = TextRegression.statistics(task, torch.from_numpy(predicted)[:, None], batch)
    worst = TextRegression.statistics(task, torch.tensor([[-9.0], [torch.inf]]), {"targets": torch.tensor([1.0, -1.0])})
    bound = TASKS["text_regression"].sensitivity(0, {})
    assert worst.norm(dim=1).tolist() == pytest.approx([bound, bound])  # reached, so that no row is scaled down
    assert float(statistics.norm(dim=1).max()) <= bound
    broken = TextRegression.statistics(task, torch.tensor([[torch.nan]]), {"targets": torch.tensor([1.0])})
    assert broken.isfinite().all()
    got = regression_metrics(statistics.sum(0), 400, 0.0, half=20.0)
    assert got["mae"] == pytest.approx(20 * oracle.mean_absolute_error(true, predicted))
    assert got["rmse"] == pytest.approx(20 * oracle.root_mean_squared_error(true, predicted))
    assert got["r2"] == pytest.approx(oracle.r2_score(true, predicted))
    assert got["correlation"] == pytest.approx(np.corrcoef(true, predicted)[0, 1])
    assert got["rmse_interval_95"][0] < got["rmse"] < got["rmse_interval_95"][1]
    noisy = regression_metrics(statistics.sum(0), 400, 100.0, half=20.0)
    assert noisy == {"not_released": dict.fromkeys(("mae", "rmse", "r2", "correlation"), "noise")}
    readable = regression_metrics(statistics.sum(0), 400, 30.0, half=20.0)
    assert readable["not_released"] == {"r2": "noise", "correlation": "noise"}
    assert {"mae", "rmse_interval_95"} <= readable.keys()


def test_targets_beyond_the_declared_range_are_cut_off(tmp_path: Path) -> None:
    task = TRAINER_TASKS["text_regression"](REGRESSION, make_encoder_base(tmp_path / "base", "regression", "bert"), 16)
    targets = ["10", "30", "50", "-4e9", "1e300"]
    examples = task.encode({"text": ["the film"] * 5, "target": targets})
    assert examples.tensors["targets"].tolist() == [-1.0, 0.0, 1.0, -1.0, 1.0]
    with pytest.raises(TrainerFailure, match="not finite"):
        task.encode({"text": ["the film"], "target": ["nan"]})


def test_binary_counts_give_scikit_learns_figures() -> None:
    random = np.random.default_rng(0)
    true, predicted = random.random((300, 4)) < 0.3, random.random((300, 4)) < 0.4
    cells = binary_cells(torch.from_numpy(true), torch.from_numpy(predicted))
    assert float(cells.norm(dim=1).max()) == pytest.approx(2.0)  # √4 labels: the plan's sensitivity
    assert TASKS["text_classification"].sensitivity(4, {"multi_label": True}) == pytest.approx(2.0)
    got = binary_metrics(cells.sum(0).view(4, 4), 300)
    for average in ("micro", "macro"):
        assert got[f"f1_{average}"] == pytest.approx(oracle.f1_score(true, predicted, average=average))
        assert got[f"precision_{average}"] == pytest.approx(oracle.precision_score(true, predicted, average=average))
    assert got["accuracy"] == pytest.approx(float((true == predicted).mean()))


def test_tags_stand_at_the_first_piece_of_each_token(tmp_path: Path) -> None:
    base = make_encoder_base(tmp_path / "base", "tokens", "bert")
    task = TRAINER_TASKS["token_classification"](TOKENS, base, 16)
    cells = {"tokens": [json.dumps(["the", "film", "great"])], "tags": [json.dumps(["O", "O", "GOOD"])]}
    examples = task.encode(cells)
    assert examples.sequences["labels"][0].tolist() == [IGNORED, 0, 0, 1, IGNORED]
    batch = task.batch(examples, [0], torch.device("cpu"))
    outputs = torch.zeros(1, 5, 3)
    outputs[0, 3, 1] = 5.0  # right on the third token
    outputs[0, 1, 2] = 5.0  # wrong on the first
    shares = task.statistics(outputs, batch).view(3, 3)
    assert shares.sum().item() == pytest.approx(1.0)
    assert (shares[0, 2].item(), shares[0, 0].item(), shares[1, 1].item()) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    expected = torch.nn.functional.cross_entropy(outputs[0, 1:4], torch.tensor([0, 0, 1]))
    torch.testing.assert_close(task.loss(outputs, batch), expected[None])


@pytest.mark.parametrize("name", ["pair", "multi", "tokens"])
def test_classes_by_their_numbers_are_those_of_these_names(tmp_path: Path, name: str) -> None:
    base = make_encoder_base(tmp_path / "base", name, "bert")
    named, table = SPECS[name], toy_table(name, 12)
    numbered = dataclasses.replace(named, options={**named.options, "label_ids": True})
    place = {label: str(index) for index, label in enumerate(named.labels)}
    if name == "pair":
        numbers = [place[cell] for cell in table["c"]]
    else:
        numbers = [f"[{','.join(place[label] for label in json.loads(cell))}]" for cell in table["c"]]
    labels = []
    for spec, cells in ((named, table["c"]), (numbered, numbers)):
        columns = {role: cells if column == "c" else table[column] for role, column in spec.columns.items()}
        examples = TRAINER_TASKS[spec.type](spec, base, 16).encode(columns)
        found = examples.sequences["labels"] if name == "tokens" else examples.tensors["labels"]
        labels.append([row.tolist() for row in found])
    assert labels[0] == labels[1]
    with pytest.raises(TrainerFailure, match=r"label|tags"):
        TRAINER_TASKS[named.type](numbered, base, 16).encode(
            {role: table[column][:2] for role, column in named.columns.items()}
        )


def test_entities_against_counts_by_hand() -> None:
    true = ["B-PER I-PER O B-LOC", "O B-LOC I-LOC O", "B-PER B-PER O"]
    told = ["B-PER I-PER O B-PER", "O B-LOC O     O", "B-PER I-PER O"]
    # PER: 3 true, 3 told, 1 right (two adjacent ones were taken for one). LOC: 2 true, 1 told, none whole.
    got = entities.scores([row.split() for row in true], [row.split() for row in told])
    assert got["entity_precision"] == pytest.approx(1 / 4)
    assert got["entity_recall"] == pytest.approx(1 / 5)
    assert got["entity_f1"] == pytest.approx(2 / 9)
    assert got["entity_f1_per_type"] == {"PER": pytest.approx(2 / 6), "LOC": 0.0}
    # The same in another spelling of the same entities: a last token of its own kind, and one that stands alone.
    spelt = [["B-PER", "M-PER", "E-PER", "S-LOC"], ["B-PER", "I-PER", "L-PER", "U-LOC"]]
    assert all(entities.scores([each], [each])["entity_f1"] == 1.0 for each in spelt)
    wrong = entities.scores([["S-LOC", "S-LOC"]], [["B-LOC", "E-LOC"]])
    assert wrong["entity_f1"] == 0.0
    assert entities.of_a_scheme(("O", "B-PER", "I-PER"))
    assert not entities.of_a_scheme(("O", "GOOD", "BAD"))
    assert not entities.of_a_scheme(("O",))


def test_what_is_hidden_of_a_row_does_not_depend_on_other_rows(tmp_path: Path) -> None:
    base = make_encoder_base(tmp_path / "base", "masked", "bert")
    task = MaskedLanguageModeling(MASKED, base, 16)
    texts = [text for text, _ in rows(20)]
    first, second = (task.encode({"text": each}) for each in (texts, [*texts[:5], "the plot " * 8, *texts[6:]]))
    for row in range(20):
        same = first.sequences["labels"][row].tolist() == second.sequences["labels"][row].tolist()
        assert same == (row != 5)
        labels, inputs = first.sequences["labels"][row], first.sequences["input_ids"][row]
        assert (labels != IGNORED).any()
        assert (labels[[0, -1]] == IGNORED).all()  # [CLS], [SEP]
        assert len(labels) == len(inputs)
    fewer = task.encode({"text": texts[3:]})  # of a person with three records, replaced by nothing
    for name in ("input_ids", "labels"):
        moved = zip(fewer.sequences[name], first.sequences[name][3:], strict=True)
        assert all(np.array_equal(one, other) for one, other in moved)
    model = BertForMaskedLM.from_pretrained(base)
    model.train(False)
    batch = task.batch(first, range(4), torch.device("cpu"))
    with torch.no_grad():
        losses = task.loss(task.outputs(model, batch), batch)
        for row in range(4):
            ids, labels = (torch.from_numpy(first.sequences[key][row])[None] for key in ("input_ids", "labels"))
            torch.testing.assert_close(losses[row], model(input_ids=ids, labels=labels).loss)
