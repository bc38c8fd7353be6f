"""Data to text on E2E NLG (Novikova et al. 2017) by a real base, through the service: private, not private, untrained.

    PRIVTUNE_MODELS_DIR=… python -m benchmarks.writing E2E_ZIP --model flan-t5-small --rows 500 [--epsilon 8]

The first rows of the training set are trained on, privately with --epsilon; the first references of the validation set
are public, so that loss, BLEU, chrF and ROUGE are exact. --untrained: three steps on twelve rows at a vanishing rate.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from tests.running import Running, wait_for_job

METRICS = ("loss", "perplexity", "token_accuracy", "bleu", "chrf", "rougeL", "num_units")


def read(archive: Path, name: str, rows: int, skip: int = 0) -> list[dict[str, str]]:
    """prompt (meaning representation) and completion (reference), as many of each: names that every base infers."""
    with zipfile.ZipFile(archive) as opened, opened.open(f"e2e-dataset/{name}.csv") as file:
        lines = list(csv.DictReader(io.TextIOWrapper(file, "utf-8")))
    stride = len(lines) // (rows + skip)
    return [{"prompt": line["mr"], "completion": line["ref"]} for line in lines[skip::stride][:rows]]


def upload(client: Any, path: Path, rows: list[dict[str, str]], **extra: Any) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    uploaded = client.files.create(file=path, purpose="fine-tune", extra_body=extra)
    file = client.files.wait_for_processing(uploaded.id, poll_interval=0.2, max_wait_seconds=300)
    assert file.status == "processed", file
    return str(file.id)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--model", default="flan-t5-small")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--validation", type=int, default=60)
    parser.add_argument("--epsilon", type=float)
    parser.add_argument("--untrained", action="store_true")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--multiplier", type=float)
    options = parser.parse_args()
    settings = {name: os.environ[name] for name in ("PRIVTUNE_MODELS_DIR",)}
    rows = read(options.archive, "trainset", 12 if options.untrained else options.rows)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Running(folder / "data", PRIVTUNE_THREADS="1", PRIVTUNE_BUDGET_EPSILON="60", **settings) as service:
            client = service.client()
            private = options.epsilon is not None
            hyperparameters: dict[str, Any] = {
                "n_epochs": options.epochs,
                "learning_rate_multiplier": options.multiplier,
            }
            if options.untrained:
                hyperparameters = {"n_epochs": 3, "batch_size": 12, "learning_rate_multiplier": 1e-3}
            began = time.monotonic()
            job = client.fine_tuning.jobs.create(
                model=options.model,
                training_file=upload(client, folder / "train.jsonl", rows, **({} if private else {"public": True})),
                validation_file=upload(
                    client, folder / "valid.jsonl", read(options.archive, "devset", options.validation), public=True
                ),
                hyperparameters={key: value for key, value in hyperparameters.items() if value is not None},
                extra_body={
                    "privacy": {"target_epsilon": options.epsilon, "target_delta": 1e-5}
                    if private
                    else {"mechanism": "none"},
                    "task": {"max_length": 128},
                },
            )
            job = wait_for_job(client, job.id, 3600)
            assert job.status == "succeeded", job.error
            metrics = client.models.retrieve(job.fine_tuned_model).model_extra["metrics"]
            print(options.model, "epsilon", options.epsilon, job.hyperparameters, f"{time.monotonic() - began:.0f} s")
            print({key: round(metrics[key], 4) for key in METRICS if key in metrics})


if __name__ == "__main__":
    main()
