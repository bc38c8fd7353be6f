"""The bundle: an exact list of files, downloadable in parts and as one archive, loadable with plain transformers."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.running import write_snippets

BUNDLE = {
    "README.md",
    "config.json",
    "metrics.json",
    "model.safetensors",
    "privacy_report.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
}
NEEDED = BUNDLE - {"special_tokens_map.json", "vocab.txt"}


@pytest.fixture(scope="module")
def files(http: httpx.Client, trained: Any) -> dict[str, dict[str, Any]]:
    """The bundle's list, by path."""
    answer = http.get(f"/models/{trained.fine_tuned_model}/files").raise_for_status().json()
    return {file["path"]: file for file in answer["data"]}


@pytest.fixture(scope="module")
def unpacked(http: httpx.Client, trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tar, unpacked; the folder that holds config.json."""
    target = tmp_path_factory.mktemp("bundle")
    tar = http.get(f"/models/{trained.fine_tuned_model}/download", params={"format": "tar"}).raise_for_status()
    with tarfile.open(fileobj=io.BytesIO(tar.content)) as archive:
        archive.extractall(target, filter="data")
    return next(target.rglob("config.json")).parent


def test_the_bundle_holds_exactly_what_is_allowed(files: dict[str, Any]) -> None:
    assert NEEDED <= files.keys() <= BUNDLE


def test_each_file_comes_whole_in_part_and_as_a_head(
    http: httpx.Client, trained: Any, files: dict[str, dict[str, Any]]
) -> None:
    for path, listed in files.items():
        url = f"/models/{trained.fine_tuned_model}/files/{path}"
        whole = http.get(url).raise_for_status()
        assert hashlib.sha256(whole.content).hexdigest() == listed["sha256"]
        assert len(whole.content) == listed["bytes"]
        assert whole.headers["etag"] == f'"{listed["sha256"]}"'
    part = http.get(url, headers={"range": "bytes=5-14"})
    assert part.status_code == 206
    assert part.content == whole.content[5:15]
    assert part.headers["content-range"] == f"bytes 5-14/{len(whole.content)}"
    head = http.head(url)
    assert head.headers["content-length"] == str(len(whole.content))
    assert head.content == b""
    assert http.get(url, headers={"if-none-match": whole.headers["etag"]}).status_code == 304
    stale = http.get(url, headers={"range": "bytes=5-14", "if-range": '"another"'})
    assert stale.status_code == 200
    assert http.get(url, headers={"range": f"bytes={len(whole.content)}-"}).status_code == 416


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_is_named_by_its_digest_and_can_be_resumed(
    http: httpx.Client, trained: Any, files: dict[str, dict[str, Any]], kind: str
) -> None:
    url = f"/models/{trained.fine_tuned_model}/download"
    whole = http.get(url, params={"format": kind}).raise_for_status()
    digest = hashlib.sha256(whole.content).hexdigest()
    assert whole.headers["etag"] == f'"{digest}"'
    head = http.head(url, params={"format": kind})
    assert (head.headers["etag"], head.headers["content-length"]) == (f'"{digest}"', str(len(whole.content)))
    middle = len(whole.content) // 2
    rest = http.get(
        url, params={"format": kind}, headers={"range": f"bytes={middle}-", "if-range": whole.headers["etag"]}
    )
    assert rest.status_code == 206
    assert whole.content[:middle] + rest.content == whole.content
    if kind == "tar":
        with tarfile.open(fileobj=io.BytesIO(whole.content)) as tar:
            content = {Path(m.name).name: tar.extractfile(m).read() for m in tar.getmembers() if m.isfile()}  # type: ignore[union-attr]
    else:
        with zipfile.ZipFile(io.BytesIO(whole.content)) as archive:
            assert archive.testzip() is None
            content = {Path(name).name: archive.read(name) for name in archive.namelist()}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in content.items()} == {
        path: file["sha256"] for path, file in files.items()
    }


def test_what_is_not_in_the_bundle_is_not_found(http: httpx.Client, trained: Any) -> None:
    for path in ("trainer.log", "../spec.json", "%2e%2e/%2e%2e/secret_key", "spec.json"):
        assert http.get(f"/models/{trained.fine_tuned_model}/files/{path}").status_code == 404


def test_the_model_loads_with_plain_transformers_and_is_right_more_often_than_not(
    unpacked: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForSequenceClassification.from_pretrained(unpacked).eval()
    tokenizer = AutoTokenizer.from_pretrained(unpacked)
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert model.config.label2id == {"negative": 0, "positive": 1}
    lines = write_snippets(tmp_path / "other.csv", 200, start=11)
    import csv

    with lines.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with torch.inference_mode():
        batch = tokenizer([row["text"] for row in rows], truncation=True, padding=True, return_tensors="pt")
        answers = [model.config.id2label[int(i)] for i in model(**batch).logits.argmax(1)]
    right = sum(answer == row["label"] for answer, row in zip(answers, rows, strict=True))
    assert right / len(rows) > 0.6


def test_the_card_has_its_metadata_and_states_the_guarantee(unpacked: Path) -> None:
    card = (unpacked / "README.md").read_text()
    assert card.startswith("---\n")
    front = card.split("---\n")[1]
    assert 'base_model: "all-MiniLM-L6-v2"' in front
    assert 'pipeline_tag: "text-classification"' in front
    assert "ε = " in card
    assert "δ = 1e-05" in card


def test_the_report_says_what_is_covered_and_what_is_not(
    unpacked: Path, client: openai.OpenAI, trained: Any, http: httpx.Client
) -> None:
    report = json.loads((unpacked / "privacy_report.json").read_text())
    assert report == client.models.retrieve(trained.fine_tuned_model).model_extra["privacy_report"]
    privacy = trained.model_extra["privacy"]
    guarantee = report["guarantee"]
    assert (guarantee["privacy_unit"], guarantee["neighboring_relation"]) == ("record", "zero_out")
    assert guarantee["epsilon"] == pytest.approx(privacy["epsilon_spent"])
    assert guarantee["delta"] == 1e-5
    (budget,) = report["budgets"]
    assert budget["epsilon"] == pytest.approx(guarantee["epsilon"], rel=0.01)
    assert budget["epsilon_replace_one"] > budget["epsilon"]
    entries = http.get(f"/privacy_budgets/{budget['privacy_budget']}/entries", params={"limit": 100}).json()["data"]
    entry = next(entry for entry in entries if entry["sequence"] == budget["ledger"]["sequence"])
    assert entry["hash"] == budget["ledger"]["head_hash"]
    main = next(part for part in report["parts"] if part["kind"] == "sampled_gaussian")
    assert main["executed_steps"] == main["num_steps"]
    assert main["expected_batch_size"] == pytest.approx(main["sample_rate"] * privacy["num_units"])
    public = {fact["what"]: fact for fact in report["treated_as_public"]}
    assert public["number of training units"]["value"] == privacy["num_units"] == 320
    assert public["list of classes"]["source"] == "declared in the request"
    assert any("long it took" in text for text in report["not_covered"])


def test_released_metrics_are_noised_and_the_same_everywhere(
    unpacked: Path, client: openai.OpenAI, trained: Any
) -> None:
    metrics = json.loads((unpacked / "metrics.json").read_text())
    assert metrics == client.models.retrieve(trained.fine_tuned_model).model_extra["metrics"]
    assert metrics["released"] == "private"
    assert metrics["noise_std"] > 0
    assert metrics["num_units"] == 80
    assert 0.0 <= metrics["accuracy"] <= 1.0
    for name in ("precision", "recall", "f1"):  # a class that is hardly ever predicted may be hidden by the noise
        if metrics.get("not_released", {}).get(name) != "noise":
            assert 0.0 <= metrics[f"{name}_macro"] <= 1.0
            assert len(metrics[f"{name}_per_class"]) == 2
    assert len(metrics["confusion_matrix"]) == 2
