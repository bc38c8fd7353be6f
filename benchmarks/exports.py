"""Every export of one private MiniLM: size, speed, agreement with the model, accuracy on rows that none learnt from.

    python -m benchmarks.exports [--rows 4000] [--public-rows 1500] [--test-rows 1000]

A running service trains a LoRA at ε = 8 on the demo's snippets, and makes all exports of it; the student learns from
other rows of the same source, declared public. Size, speed and agreement are the service's own figures; each export is
then downloaded and answers the test rows in its own runtime. One thread.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import httpx
import numpy as np

from app.catalog.exports import EXPORT_FORMATS
from tests.running import BASE_MODEL, SNIPPETS, Running, until, wait_for_job

LABELS = ("negative", "positive")

Answer = Callable[[list[str]], Any]


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--public-rows", type=int, default=1500)
    parser.add_argument("--test-rows", type=int, default=1000)
    arguments = parser.parse_args()
    with SNIPPETS.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    order = np.random.default_rng(0).permutation(len(rows))
    ends = np.cumsum([arguments.rows, arguments.public_rows, arguments.test_rows])
    private, public, test = ([rows[index] for index in part] for part in np.split(order, ends)[:3])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Running(folder / "data", PRIVTUNE_THREADS="1") as service:
            _report(service, folder, private, public, test)


def _report(service: Running, folder: Path, private: Any, public: Any, test: Any) -> None:
    client = service.client()
    headers = {"authorization": f"Bearer {client.api_key}"}
    with httpx.Client(base_url=f"{service.url}/v1", headers=headers, timeout=120) as http:
        training, open_rows = _upload(client, folder, "private", private), _upload(client, folder, "public", public)
        job = client.fine_tuning.jobs.create(
            model=BASE_MODEL,
            training_file=training,
            hyperparameters={"n_epochs": 3, "batch_size": 400},
            extra_body={
                "task": {"type": "text_classification", "labels": list(LABELS), "max_length": 48},
                "adaptation": {"type": "lora", "rank": 8},
                "privacy": {"target_epsilon": 8.0, "target_delta": 1e-5},
                "evaluation": "none",
                "export": {
                    "formats": list(EXPORT_FORMATS),
                    "student": {"training_file": open_rows, "num_layers": 4, "n_epochs": 4},
                },
            },
        )
        ended = wait_for_job(client, job.id, 1800)
        assert ended.status == "succeeded", ended.error

        def exported() -> Any:
            exports = client.fine_tuning.jobs.retrieve(job.id).model_extra["exports"]
            return exports if all(entry["status"] in ("succeeded", "failed") for entry in exports) else None

        print(f"{'export':12}{'MB':>8}{'smaller':>9}{'speedup':>9}{'agreement':>11}{'rel. diff':>11}{'accuracy':>10}")
        for entry in until(exported, 1800, every=2):
            figures = entry["metrics"]
            if figures is None:
                print(f"{entry['format']:12} {entry['error']['code']}")
                continue
            where = _fetch(http, ended.fine_tuned_model, entry, folder)
            print(
                f"{entry['format']:12}{figures['weights_bytes'] / 1e6:8.1f}{figures['compression']:9.2f}"
                f"{figures['speedup']:9.2f}{figures['agreement']:11.3f}{figures['relative_difference']:11.2g}"
                f"{_accuracy(_answers(entry['format'], where), test):10.3f}",
                flush=True,
            )


def _upload(client: Any, folder: Path, name: str, rows: Any) -> str:
    path = folder / f"{name}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    body = {"public": "true"} if name == "public" else {}
    made = client.files.create(file=path, purpose="fine-tune", extra_body=body)
    return str(client.files.wait_for_processing(made.id, poll_interval=0.2).id)


def _fetch(http: httpx.Client, model: str, entry: Any, folder: Path) -> Path:
    tar = http.get(f"/models/{model}/exports/{entry['id']}/download").raise_for_status()
    target = folder / entry["format"]
    with tarfile.open(fileobj=io.BytesIO(tar.content)) as archive:
        archive.extractall(target, filter="data")
    return target / "model"


def _answers(format_: str, folder: Path) -> Answer:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encoded(texts: list[str], kind: str) -> Any:
        return tokenizer(texts, padding=True, truncation=True, return_tensors=kind)

    if EXPORT_FORMATS[format_].runtime == "onnxruntime":
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / "model.onnx")
        names = [entry.name for entry in session.get_inputs()]

        def run(texts: list[str]) -> Any:
            inputs = encoded(texts, "np")
            return session.run(None, {name: inputs[name] for name in names})[0]

        return run
    if format_ == "adapter":
        from peft import PeftModel

        from app.catalog.bases import BASES
        from app.models.catalog import base_path

        config = AutoConfig.from_pretrained(folder)
        base = AutoModelForSequenceClassification.from_pretrained(base_path(BASES[BASE_MODEL]), config=config)
        model: Any = PeftModel.from_pretrained(base, folder).eval()
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto").eval()

    def by_torch(texts: list[str]) -> Any:
        with torch.inference_mode():
            return model(**encoded(texts, "pt")).logits.float().numpy()

    return by_torch


def _accuracy(answer: Answer, test: Any) -> float:
    right = 0
    for start in range(0, len(test), 50):
        batch = test[start : start + 50]
        told = answer([row["text"] for row in batch]).argmax(1)
        right += sum(LABELS[index] == row["label"] for index, row in zip(told, batch, strict=True))
    return right / len(test)


if __name__ == "__main__":
    main()
