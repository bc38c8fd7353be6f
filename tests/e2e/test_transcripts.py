"""Neighbouring datasets: the same number of units, one of them ordinary, as good as nothing, or enormous.

All that a tenant can see of the two is equal to the byte, apart from the fields that docs/privacy.md names: what was
noised, times, the file's size, and names and digests that are drawn or computed anew each time.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path, PurePath
from typing import Any

import httpx
import pytest
import torch

from tests.running import BASE_MODEL, TERMINAL, Running, until

N = 120

#: One unit's text: the others are the same in every dataset.
VARIANTS = {"ordinary": "the doctor was kind and the food was good", "nothing": ".", "enormous": "unbearable " * 40_000}

#: What may differ, by name (docs/privacy.md, "What may differ between two such data sets").
TIMES = {
    "created",
    "created_at",
    "started_at",
    "finished_at",
    "issued_at",
    "estimated_finish",
    "queued_for",
    "expires_at",
}
SIZES = {"bytes", "bytes_read"}
NOISED = {"train_loss", "train_loss_interval_95"}
#: Missing, too, where the noised counts are too small to be read.
NOISED_COUNTS = {
    "accuracy", "accuracy_interval_95", "precision_macro", "recall_macro", "f1_macro", "f1_micro",
    "precision_per_class", "recall_per_class", "f1_per_class", "confusion_matrix", "not_released",
}  # fmt: skip
DRAWN = {"sha256", "hash", "previous_hash", "head_hash", "training_rows", "validation_rows", "value"}
MAY_DIFFER = TIMES | SIZES | NOISED | NOISED_COUNTS | DRAWN

#: Of a bundle: what holds noised numbers, or the report. All else is equal to the byte.
RELEASED = {"model.safetensors", "metrics.json", "privacy_report.json", "README.md"}

_ID = re.compile(
    r"\b(?:file|ftjob|ftevent|ftckpt|pb|entry|res)-[0-9a-z]{26}(?:-\d+)?|\bft-[A-Za-z0-9._-]+|[0-9a-f]{64}\b"
)


class Tenant:
    """Everything that the tenant asks for, and is told."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self._names: dict[str, str] = {}
        self.heard: list[str] = []

    def ask(self, method: str, path: str, **request: Any) -> Any:
        """The answer; its status, headers' names and body go to the transcript."""
        answer = self._http.request(method, path, **request)
        body = answer.json()
        self.hear(answer, body)
        return body

    def open(self, path: str) -> None:
        """A bundle's files."""
        with tarfile.open(fileobj=io.BytesIO(self._http.get(path).content)) as archive:
            files = {PurePath(entry.name).name: archive.extractfile(entry) for entry in archive if entry.isfile()}
        told = {name: "" if file is None or name in RELEASED else file.read().decode() for name, file in files.items()}
        assert len(told) > len(RELEASED)
        self.heard.append(_ID.sub(self._named, json.dumps(told, sort_keys=True)))

    def hear(self, answer: httpx.Response, body: Any) -> None:
        headers = sorted(
            (name, answer.headers[name]) for name in ("content-type", "cache-control") if name in answer.headers
        )
        said = {"status": answer.status_code, "names": sorted(answer.headers), "headers": headers, "body": masked(body)}
        self.heard.append(_ID.sub(self._named, json.dumps(said, sort_keys=True, ensure_ascii=False)))

    def _named(self, found: re.Match[str]) -> str:
        """Ids by the order in which they came up."""
        return self._names.setdefault(found[0], f"<{len(self._names)}>")


def masked(value: Any) -> Any:
    """Without what may differ; whether it is there, and of which form, may not."""
    if isinstance(value, dict):
        told = {key: inner for key, inner in value.items() if key not in NOISED_COUNTS}
        return {key: form_of(inner) if key in MAY_DIFFER else masked(inner) for key, inner in told.items()}
    return [masked(inner) for inner in value] if isinstance(value, list) else value


def form_of(value: Any) -> Any:
    if isinstance(value, list):
        return [form_of(inner) for inner in value]
    return "a number" if isinstance(value, int | float) else type(value).__name__


def dataset(text: str, start: int = 0) -> bytes:
    lines = ["text,label"]
    for n in range(N):
        words = (
            text
            if n == 60
            else f"visit {start + n} was {'good' if n % 2 else 'bad'} and the ward {'quiet' if n % 3 else 'loud'}"
        )
        lines.append(f"{words},{'fine' if n % 2 else 'poor'}")
    return ("\n".join(lines) + "\n").encode()


@pytest.fixture(scope="module")
def http(service: Running, client: Any) -> Any:
    headers = {"authorization": f"Bearer {client.api_key}"}
    with httpx.Client(base_url=f"{service.url}/v1", headers=headers, timeout=60) as opened:
        yield opened


def follow(http: httpx.Client, text: str) -> tuple[list[str], dict[str, Any]]:
    """One tenant's whole way with a dataset; the transcript, and the model."""
    tenant = Tenant(http)
    budget = tenant.ask("POST", "/privacy_budgets", json={"name": "ward", "epsilon_limit": 20.0, "delta": 1e-5})
    form = {"purpose": "fine-tune", "privacy_budget": budget["id"]}
    uploaded = tenant.ask("POST", "/files", files={"file": ("ward.csv", dataset(text))}, data=form)
    path = f"/files/{uploaded['id']}"
    until(lambda: http.get(path).json()["status"] != "uploaded")
    file = tenant.ask("GET", path)
    assert file["status"] == "processed", file
    tenant.ask("GET", f"{path}/units")
    # A validation file that the tenant's neighbours differ in, too.
    held = http.post("/files", files={"file": ("held.csv", dataset(text, start=1000))}, data=form).json()
    until(lambda: http.get(f"/files/{held['id']}").json()["status"] != "uploaded")
    body = {
        "model": BASE_MODEL,
        "training_file": file["id"],
        "validation_file": held["id"],
        "task": {"labels": ["fine", "poor"], "max_length": 64},
        "adaptation": {"type": "head"},
        "privacy": {"target_epsilon": 4.0, "target_delta": 1e-6},
        "evaluation": {"epsilon_share": 0.3},
        "seed": 7,
        "checkpoints": {"count": 1},
    }
    tenant.ask("POST", "/fine_tuning/jobs/estimate", json=body)
    tenant.ask("POST", "/fine_tuning/jobs/estimate", json={**body, "privacy": {"target_epsilon": 100.0}})
    tenant.ask("POST", "/fine_tuning/jobs", json={**body, "task": {"labels": ["fine"]}})
    tenant.ask("POST", "/fine_tuning/jobs", json={**body, "task": {"columns": {"label": "text"}}})
    job = tenant.ask("POST", "/fine_tuning/jobs", json=body)
    path = f"/fine_tuning/jobs/{job['id']}"
    until(lambda: http.get(path).json()["status"] in TERMINAL, 120, every=0.2)
    job = tenant.ask("GET", path)
    assert job["status"] == "succeeded", job
    # How many reports of progress there are is a question of speed; what each may say is not.
    answer = http.get(f"{path}/events", params={"limit": 100})
    events = answer.json()
    events["data"] = [event for event in events["data"] if event["code"] != "progress"]
    for event in events["data"]:
        if event["code"] == "train_loss":  # its words tell the noised number once more
            event["message"] = re.sub(r"training loss [-\d.]+", "training loss …", event["message"])
    tenant.hear(answer, events)
    checkpoints = tenant.ask("GET", f"{path}/checkpoints")["data"]
    assert len(checkpoints) == 2
    for checkpoint in checkpoints:
        name = checkpoint["fine_tuned_model_checkpoint"]
        tenant.ask("GET", f"/models/{name}")
        tenant.ask("GET", f"/models/{name}/files")
        tenant.ask("GET", f"/models/{name}/privacy_report")
        tenant.open(f"/models/{name}/download")
    names = {checkpoint["fine_tuned_model_checkpoint"] for checkpoint in checkpoints}
    models = http.get("/models")
    tenant.hear(models, [model for model in models.json()["data"] if model["id"] in names])
    for tail in ("", "/entries", "/timeline", "/audit"):
        tenant.ask("GET", f"/privacy_budgets/{budget['id']}{tail}")
    return tenant.heard, http.get(f"/models/{job['fine_tuned_model']}").json()


@pytest.fixture(scope="module")
def followed(http: httpx.Client) -> dict[str, tuple[list[str], dict[str, Any]]]:
    return {name: follow(http, text) for name, text in VARIANTS.items()}


@pytest.mark.parametrize("name", ["nothing", "enormous"])
def test_transcripts_of_neighbours_are_equal(followed: dict[str, Any], name: str) -> None:
    expected, heard = followed["ordinary"][0], followed[name][0]
    assert len(expected) == len(heard) > 20
    assert [other for one, other in zip(expected, heard, strict=True) if one != other] == []


def test_what_may_differ_is_what_the_documentation_names() -> None:
    text = (Path(__file__).parents[2] / "docs" / "privacy.md").read_text(encoding="utf-8")
    assert [name for name in sorted(MAY_DIFFER) if f"`{name}`" not in text] == []


def test_the_released_accuracy_is_the_exact_one_and_noise(
    http: httpx.Client, followed: dict[str, Any], tmp_path: Path
) -> None:
    """The exact one by plain transformers, from the downloaded bundle. One run in a million lies beyond 5 σ."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = followed["ordinary"][1]
    with tarfile.open(fileobj=io.BytesIO(http.get(f"/models/{model['id']}/download").content)) as archive:
        archive.extractall(tmp_path, filter="data")
    network = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = [line.rsplit(",", 1) for line in dataset(VARIANTS["ordinary"], start=1000).decode().splitlines()[1:]]
    encoded = tokenizer([text for text, _ in rows], padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        predicted = network(**encoded).logits.argmax(1).tolist()
    exact = sum(network.config.id2label[index] == label for index, (_, label) in zip(predicted, rows, strict=True)) / N
    metrics = model["metrics"]
    assert (metrics["num_units"], metrics["dataset"]) == (N, "validation_file")
    noise = 2**0.5 * metrics["noise_std"] / N
    low, high = metrics["accuracy_interval_95"]
    assert abs(metrics["accuracy"] - exact) <= 5 * noise
    assert low <= metrics["accuracy"] <= high
    assert high - low >= min(2 * 1.95 * noise, 1.0 - metrics["accuracy"], metrics["accuracy"])
