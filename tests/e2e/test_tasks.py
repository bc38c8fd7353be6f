"""Every task on encoders, images and plain text through the real client: upload, job, metrics, download, and what plain
transformers makes of the bundle on rows of the toy language. Bases are tiny random ones in a folder."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import onnxruntime
import openai
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from app.privacy.report_check import check_report
from tests.running import Running, until, wait_for_job
from tests.trainer.causal import make_causal_base, sentences
from tests.trainer.encoders import make_encoder_base, toy_table
from tests.trainer.images import answers_elsewhere, make_image_base, picture

PUBLIC: dict[str, Any] = {"privacy": {"mechanism": "none"}}
PRIVATE: dict[str, Any] = {"privacy": {"target_epsilon": 100.0, "target_delta": 1e-5}}
FULL: dict[str, Any] = {"adaptation": {"type": "full"}, "optimizer": {"type": "adamw", "learning_rate": 1e-2}}
#: At the rate above a text of two parts is sometimes not learnt at all.
GENTLY: dict[str, Any] = {"adaptation": {"type": "full"}, "optimizer": {"type": "adamw", "learning_rate": 3e-3}}
ROWS = 160


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_encoder_base(root / "tiny-bert", "masked", "bert")
    make_causal_base(root / "tiny-gpt2", "gpt2")
    for family in ("vit", "resnet", "efficientnet"):
        make_image_base(root / f"tiny-{family}", family)
    return root


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[openai.OpenAI]:
    with running.client() as opened:
        yield opened


class Trained:
    """A job's way from bytes to a bundle on disk."""

    def __init__(
        self,
        running: Running,
        client: openai.OpenAI,
        into: Path,
        name: str,
        content: bytes,
        base: str,
        n_epochs: int = 30,
        **body: Any,
    ) -> None:
        public = body["privacy"].get("mechanism") == "none"
        file = client.files.create(
            file=(name, content), purpose="fine-tune", extra_body={"public": "true"} if public else None
        )
        file = client.files.wait_for_processing(file.id, poll_interval=0.1, max_wait_seconds=60)
        assert file.status == "processed", file
        job = client.fine_tuning.jobs.create(
            model=base,
            training_file=file.id,
            hyperparameters={"n_epochs": n_epochs, "batch_size": ROWS // 2},
            extra_body={"evaluation": {"split": 0.2}, **body},
        )
        self.job: Any = wait_for_job(client, job.id)
        assert self.job.status == "succeeded", self.job.error
        headers = {"authorization": f"Bearer {client.api_key}"}
        url = f"{running.url}/v1/models/{self.job.fine_tuned_model}/download"
        tar = httpx.get(url, params={"format": "tar"}, headers=headers, timeout=60).raise_for_status()
        with tarfile.open(fileobj=io.BytesIO(tar.content)) as archive:
            archive.extractall(into, filter="data")
        self.bundle = next(into.rglob("config.json")).parent
        self.metrics: dict[str, Any] = json.loads((self.bundle / "metrics.json").read_text())
        assert self.metrics["released"] == ("public" if public else "private")
        report = json.loads((self.bundle / "privacy_report.json").read_text())
        assert public or [check.name for check in check_report(report) if not check.holds] == []

    @property
    def task(self) -> str:
        """What the job trained, named or inferred."""
        return str(self.job.model_extra["task"]["type"])


def lines(table: dict[str, list[Any]]) -> bytes:
    """JSON lines of a table."""
    return "\n".join(
        json.dumps(dict(zip(table, row, strict=True))) for row in zip(*table.values(), strict=True)
    ).encode()


def logits(kind: Any, folder: Path, *texts: list[str]) -> torch.Tensor:
    """What a model in a folder says of texts, or pairs of them."""
    model, tokenizer = kind.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return model(**tokenizer(*texts, return_tensors="pt", padding=True)).logits


def losses(kind: Any, folder: Path, inputs: dict[str, torch.Tensor]) -> float:
    with torch.inference_mode():
        return float(kind.from_pretrained(folder)(**inputs).loss)


def test_pairs_of_texts(running: Running, client: openai.OpenAI, tmp_path: Path) -> None:
    table = toy_table("pair", ROWS)
    named = {"sentence1": table["a"], "sentence2": table["b"], "label": table["c"]}
    got = Trained(running, client, tmp_path, "pairs.jsonl", lines(named), "tiny-bert", 60, **PUBLIC, **GENTLY)
    assert got.task == "text_classification"
    assert got.metrics["accuracy"] > 0.7
    told = logits(AutoModelForSequenceClassification, got.bundle, table["a"], table["b"]).argmax(1)
    names = AutoModelForSequenceClassification.from_pretrained(got.bundle).config.id2label
    right = [names[int(each)] == label for each, label in zip(told, table["c"], strict=True)]
    assert sum(right) > 0.75 * ROWS


def test_several_labels_as_a_list(running: Running, client: openai.OpenAI, tmp_path: Path) -> None:
    table = toy_table("multi", ROWS)
    named = {"text": table["a"], "labels": [json.loads(each) for each in table["c"]]}
    got = Trained(running, client, tmp_path, "several.jsonl", lines(named), "tiny-bert", **PUBLIC, **FULL)
    assert got.task == "text_classification"
    assert got.metrics["f1_micro"] > 0.7
    model = AutoModelForSequenceClassification.from_pretrained(got.bundle)
    assert model.config.problem_type == "multi_label_classification"
    told = logits(AutoModelForSequenceClassification, got.bundle, table["a"]) > 0
    wanted = torch.tensor(
        [[name in each for _, name in sorted(model.config.id2label.items())] for each in named["labels"]]
    )
    assert float((told == wanted).float().mean()) > 0.75


def test_a_private_regression(running: Running, client: openai.OpenAI, tmp_path: Path) -> None:
    table = toy_table("regression", ROWS)
    content = "\n".join(["text,score", *map(",".join, zip(table["a"], table["c"], strict=True))]).encode()
    task = {"range": [10.0, 50.0]}  # says that it is one
    got = Trained(running, client, tmp_path, "scores.csv", content, "tiny-bert", **PRIVATE, **FULL, task=task)
    assert got.task == "text_regression"
    low, high = got.metrics["rmse_interval_95"]
    assert low <= got.metrics["rmse"] <= high
    assert high > 0.0
    told = logits(AutoModelForSequenceClassification, got.bundle, table["a"])[:, 0]
    errors = told - torch.tensor([float(each) for each in table["c"]])
    assert float(errors.abs().mean()) < 15.0  # the mean of 10 and 50 is 20 away from both


@pytest.mark.parametrize("name", ["tags.conll", "tags.jsonl", "tags.parquet"])
def test_tags_of_tokens(running: Running, client: openai.OpenAI, tmp_path: Path, name: str) -> None:
    """As CoNLL, as JSON lines, and as Hugging Face datasets have them: integers, whose names the job declares."""
    table = toy_table("tokens", ROWS)
    tokens, tags = ([json.loads(each) for each in table[key]] for key in "ac")
    declared: dict[str, Any] = {}
    if name.endswith("parquet"):
        tags = [[tag if tag == "O" else f"B-{tag}" for tag in each] for each in tags]
        declared = {"task": {"labels": ["O", "B-GOOD", "B-BAD"]}}
        numbers = [[declared["task"]["labels"].index(tag) for tag in each] for each in tags]
        packed = io.BytesIO()
        pq.write_table(pa.table({"tokens": tokens, "ner_tags": numbers}), packed)
        content = packed.getvalue()
    elif name.endswith("conll"):
        tags = [[tag if tag == "O" else f"B-{tag}" for tag in each] for each in tags]
        said = ["\n".join(map("\t".join, zip(*each, strict=True))) for each in zip(tokens, tags, strict=True)]
        content = "\n\n".join(said).encode()
    else:
        content = lines({"tokens": tokens, "tags": tags})
    got = Trained(running, client, tmp_path, name, content, "tiny-bert", **PUBLIC, **FULL, **declared)
    assert got.task == "token_classification"
    assert got.metrics["f1_macro"] > 0.6
    if not name.endswith("jsonl"):  # B- says where entities begin
        assert min(got.metrics[f"entity_{each}"] for each in ("precision", "recall", "f1")) > 0.6
        assert got.metrics["entity_f1_per_type"].keys() == {"BAD", "GOOD"}
        assert "entity F1" in (got.bundle / "README.md").read_text()
    else:
        assert "entity_f1" not in got.metrics
        assert set(got.metrics["not_released"].values()) == {"no_entities"}
    names = AutoModelForTokenClassification.from_pretrained(got.bundle).config.id2label
    told = logits(AutoModelForTokenClassification, got.bundle, table_texts(tokens)).argmax(2)
    for row, wanted in zip(told[:6], tags, strict=False):
        assert [names[int(each)] for each in row[1 : 1 + len(wanted)]] == wanted


def table_texts(tokens: list[list[str]]) -> list[str]:
    """A word is a token."""
    return [" ".join(each) for each in tokens]


def scans() -> bytes:
    """A folder a class."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for number in range(ROWS):
            archive.writestr(f"{('dark', 'bright')[number % 2]}/{number}.png", picture(number % 2 == 1, number))
    return packed.getvalue()


def test_a_private_classifier_of_a_folder_of_images_a_class(
    running: Running, client: openai.OpenAI, tmp_path: Path
) -> None:
    got = Trained(running, client, tmp_path, "scans.zip", scans(), "tiny-vit", **PRIVATE)
    assert got.task == "image_classification"
    model = AutoModelForImageClassification.from_pretrained(got.bundle)
    processor = AutoImageProcessor.from_pretrained(got.bundle)
    fresh = [Image.open(io.BytesIO(picture(number % 2 == 1, 1000 + number))) for number in range(20)]
    with torch.inference_mode():
        told = model(**processor(fresh, return_tensors="pt")).logits.argmax(1)
    right = [model.config.id2label[int(each)] == ("dark", "bright")[n % 2] for n, each in enumerate(told)]
    assert sum(right) >= 16


def test_group_norm_in_place_of_batch_norm(
    running: Running, client: openai.OpenAI, tmp_path: Path, models: Path
) -> None:
    """A bundle that brings its class: loads without this service, is exported by it, and trained further."""
    private = {**FULL, "privacy": {"target_epsilon": 50.0, "target_delta": 1e-5}, "n_epochs": 8}
    replaced = {**private, "adaptation": {"type": "full", "batch_norm": "group_norm"}}
    for base, adaptation, code in (
        ("tiny-resnet", {"type": "head", "batch_norm": "group_norm"}, "batch_norm_not_trained"),
        ("tiny-vit", replaced["adaptation"], "batch_norm_missing"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            Trained(running, client, tmp_path, "scans.zip", scans(), base, **{**private, "adaptation": adaptation})
        assert (refused.value.code, refused.value.param) == (code, "adaptation.batch_norm")
    made = {
        family: Trained(running, client, tmp_path / family, "scans.zip", scans(), f"tiny-{family}", **replaced)
        for family in ("resnet", "efficientnet")
    }
    again = Trained(
        running, client, tmp_path / "again", "scans.zip", scans(), made["resnet"].job.fine_tuned_model, **private
    )
    folders = [got.bundle for got in (*made.values(), again)]
    processor = AutoImageProcessor.from_pretrained(folders[0])
    fresh = [Image.open(io.BytesIO(picture(number % 2 == 1, 1000 + number))) for number in range(20)]
    pixels = processor(fresh, return_tensors="pt")["pixel_values"]
    told = answers_elsewhere(folders, pixels, tmp_path)
    for folder, answers in zip(folders, told, strict=True):
        assert sum(name == ("dark", "bright")[n % 2] for n, name in enumerate(answers["pipeline"])) >= 16
        assert answers["without_trust"] == "ValueError"
        assert "modeling_group_norm.py" in (folder / "README.md").read_text()
    assert made["resnet"].job.model_extra["adaptation"] == replaced["adaptation"]
    before, first, second = (
        load_file(folder / "model.safetensors") for folder in (models / "tiny-resnet", folders[0], folders[2])
    )
    norms = [name for name in before if "normalization.weight" in name]
    assert not [
        name for name in norms if torch.equal(before[name], first[name]) or torch.equal(first[name], second[name])
    ]
    report = json.loads((again.bundle / "privacy_report.json").read_text())
    assert [entry["model"] for entry in report["lineage"]["models"]] == [made["resnet"].job.fine_tuned_model]

    url = f"{running.url}/v1/models/{made['efficientnet'].job.fine_tuned_model}/exports"
    with httpx.Client(headers={"authorization": f"Bearer {client.api_key}"}, timeout=60) as http:
        url += "/" + http.post(url, json={"format": "onnx"}).raise_for_status().json()["id"]
        until(lambda: http.get(url).json()["status"] in ("succeeded", "failed"), 200)
        export = http.get(url).json()
        assert (export["status"], export["metrics"]["agreement"]) == ("succeeded", 1.0), export
        (tmp_path / "model.onnx").write_bytes(http.get(f"{url}/files/model.onnx").raise_for_status().content)
    (answered,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"pixel_values": pixels.numpy()})
    assert torch.allclose(torch.from_numpy(answered), torch.tensor(told[1]["logits"]), rtol=1e-3, atol=1e-3)


def test_plain_text_of_a_causal_model(running: Running, client: openai.OpenAI, tmp_path: Path, models: Path) -> None:
    content = lines({"text": sentences(ROWS)})
    part = {**FULL, "adaptation": {"type": "freeze", "patterns": ["wpe.*", "h.0.*"]}}
    misspelt = {"type": "freeze", "patterns": ["wpe.*", "layers.0.*"]}
    with pytest.raises(openai.BadRequestError) as refused:
        Trained(running, client, tmp_path, "texts.jsonl", content, "tiny-gpt2", **PUBLIC, adaptation=misspelt)
    assert (refused.value.code, refused.value.param) == ("freeze_matches_nothing", "adaptation.patterns")
    got = Trained(running, client, tmp_path, "texts.jsonl", content, "tiny-gpt2", **PUBLIC, **part)
    assert got.job.model_extra["adaptation"] == part["adaptation"]
    before, after = (load_file(folder / "model.safetensors") for folder in (models / "tiny-gpt2", got.bundle))
    rests = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if ".wpe." in name or ".h.0." in name} <= rests
    assert any(".h.1." in name for name in before.keys() - rests)
    assert got.task == "language_modeling"
    assert got.metrics["token_accuracy"] > 0.5
    ids = AutoTokenizer.from_pretrained(got.bundle)("the cat sat on the mat", return_tensors="pt")["input_ids"]
    inputs = {"input_ids": ids, "labels": ids}
    after, before = (losses(AutoModelForCausalLM, folder, inputs) for folder in (got.bundle, models / "tiny-gpt2"))
    assert after < 0.7 * before


def test_plain_text_of_a_masked_model(running: Running, client: openai.OpenAI, tmp_path: Path, models: Path) -> None:
    # What is hidden of a text follows from its tokens: texts of several lengths hide several places.
    texts = [" ".join([("film good", "plot bad")[n % 2]] * (2 + n % 7)) for n in range(ROWS)]
    cut = {**PUBLIC, **GENTLY, "task": {"type": "masked_lm", "max_length": 12}}
    everything = {"type": "freeze", "patterns": ["embeddings.*", "encoder.*", "cls.predictions.*"]}
    with pytest.raises(openai.BadRequestError) as refused:
        Trained(
            running,
            client,
            tmp_path,
            "texts.jsonl",
            lines({"text": texts}),
            "tiny-bert",
            **{**cut, "adaptation": everything},
        )
    assert (refused.value.code, refused.value.param) == ("freeze_matches_everything", "adaptation.patterns")
    got = Trained(running, client, tmp_path, "texts.jsonl", lines({"text": texts}), "tiny-bert", 150, **cut)
    assert got.task == "masked_lm"
    report = client.get(f"/files/{got.job.training_file}/report", cast_to=dict[str, Any])
    beyond = [max(0, len(text.split()) + 2 - 12) for text in texts]  # [CLS] and [SEP]
    assert report["truncation"] == [
        {
            "job_id": got.job.id,
            "dataset": "training",
            "model": "tiny-bert",
            "task": "masked_lm",
            "max_length": 12,
            "max_target_length": None,
            "rows": ROWS,
            "tokens": sum(len(text.split()) + 2 for text in texts),
            "cut": {"text": {"rows": sum(map(bool, beyond)), "tokens": sum(beyond)}},
        }
    ]
    assert "trunc" not in got.job.to_json() + json.dumps(got.metrics)
    assert got.metrics["token_accuracy"] > 0.5
    tokenizer = AutoTokenizer.from_pretrained(got.bundle)
    inputs = {
        **tokenizer("film [MASK] film good", return_tensors="pt"),
        "labels": tokenizer("film good film good", return_tensors="pt")["input_ids"],
    }
    inputs["labels"][inputs["input_ids"] != tokenizer.mask_token_id] = -100
    after, before = (losses(AutoModelForMaskedLM, folder, inputs) for folder in (got.bundle, models / "tiny-bert"))
    assert after < 0.7 * before
