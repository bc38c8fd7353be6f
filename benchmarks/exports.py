"""Every export of one private model: size, speed, agreement with the model, accuracy on rows that none learnt from.

    python -m benchmarks.exports [--rows 4000] [--public-rows 1500] [--test-rows 1000]
    python -m benchmarks.exports images --data DATA [--test-rows 500]
    PRIVTUNE_MODELS_DIR=… python -m benchmarks.exports summaries --data DATA --rows 240 --public-rows 400 --test-rows 60

A running service trains the model at ε = 8 (a LoRA of MiniLM on the demo's snippets, `auto` of EfficientNet-Lite0 on
CIFAR-10, a LoRA of flan-t5-small on SciTLDR), and makes all exports of it; the student of a text model learns from
other rows of the same source, declared public. Size, speed and the first agreement are the service's own figures; each
export is then downloaded and answers the test rows in its own runtime: the second agreement is of these answers with
the model's. Of summaries each token of a target counts, behind the target so far. One thread.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import httpx
import numpy as np

from app.catalog.bases import BASES
from app.catalog.exports import EXPORT_FORMATS
from app.models.catalog import base_path
from benchmarks import quality_sets as sets
from benchmarks.export_runtimes import Answers, Kind, Row, answers
from benchmarks.quality import lines
from tests.running import BASE_MODEL, SNIPPETS, Running, until, wait_for_job

#: The longest that a job, or all exports of its model, may take here.
_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class Case:
    """private: an upload's name and content; public: rows for the student, if there is one; test: rows to answer.

    job: what the request says beside files, privacy and exports. student: how one is made."""

    kind: Kind
    base: str
    private: tuple[str, bytes]
    public: list[Row]
    test: list[Row]
    job: dict[str, Any]
    student: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", choices=("texts", "images", "summaries"), default="texts")
    parser.add_argument("--data", type=Path, help="the folder of the real sets, but for texts")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--public-rows", type=int, default=1500)
    parser.add_argument("--test-rows", type=int, default=1000)
    arguments = parser.parse_args()
    if arguments.kind != "texts" and arguments.data is None:
        parser.error("--data is needed")
    case = {"texts": _texts, "images": _images, "summaries": _summaries}[arguments.kind](arguments)
    told = {name: os.environ[name] for name in ("PRIVTUNE_MODELS_DIR",) if name in os.environ}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Running(folder / "data", PRIVTUNE_THREADS="1", **told) as service:
            _report(service, folder, case)


def _texts(arguments: argparse.Namespace) -> Case:
    with SNIPPETS.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    order = np.random.default_rng(0).permutation(len(rows))
    ends = np.cumsum([arguments.rows, arguments.public_rows, arguments.test_rows])
    private, public, test = ([rows[index] for index in part] for part in np.split(order, ends)[:3])
    job = {
        "task": {"type": "text_classification", "labels": ["negative", "positive"], "max_length": 48},
        "adaptation": {"type": "lora", "rank": 8},
        "hyperparameters": {"n_epochs": 3, "batch_size": 400},
    }
    student = {"num_layers": 4, "n_epochs": 4}
    return Case("texts", BASE_MODEL, ("private.jsonl", lines(private)), public, test, job, student)


def _images(arguments: argparse.Namespace) -> Case:
    with zipfile.ZipFile(arguments.data / "cifar10_subset" / "test.zip") as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        test = [{"image": archive.read(name), "label": name.split("/")[-2]} for name in names]
    content = sets.cifar10(arguments.data, "train")
    labels = sorted({row["label"] for row in test})
    job = {"task": {"type": "image_classification", "labels": labels}}
    return Case(
        "images", "efficientnet-lite0", ("private.zip", content), [], sets.spread(test, arguments.test_rows), job
    )


def _summaries(arguments: argparse.Namespace) -> Case:
    read = sets.scitldr(arguments.rows, arguments.test_rows)
    private, test = (read(arguments.data, part) for part in ("train", "test"))
    public = sets.spread(sets.scitldr(0, 619)(arguments.data, "valid"), arguments.public_rows)
    job = {
        "task": {
            "type": "summarization", "max_length": 128, "max_target_length": 48, "source_prefix": "summarize: ",
        },
        "adaptation": {"type": "lora", "rank": 8},
        "hyperparameters": {"n_epochs": 1, "batch_size": 32},
    }  # fmt: skip
    student = {"num_layers": 4, "n_epochs": 2}
    return Case("summaries", "flan-t5-small", ("private.jsonl", lines(private)), public, test, job, student)


def _report(service: Running, folder: Path, case: Case) -> None:
    client = service.client()
    headers = {"authorization": f"Bearer {client.api_key}"}
    formats = [
        name
        for name in EXPORT_FORMATS
        if (name != "student" or case.student) and (name != "adapter" or case.job.get("adaptation"))
    ]
    export: dict[str, Any] = {"formats": formats}
    with httpx.Client(base_url=f"{service.url}/v1", headers=headers, timeout=300) as http:
        if case.student:
            public = _upload(client, folder, ("public.jsonl", lines(case.public)), public="true")
            export["student"] = {"training_file": public, **case.student}
        job = client.fine_tuning.jobs.create(
            model=case.base,
            training_file=_upload(client, folder, case.private),
            extra_body={
                **case.job,
                "privacy": {"target_epsilon": 8.0, "target_delta": 1e-5},
                "evaluation": "none",
                "export": export,
            },
        )
        ended = wait_for_job(client, job.id, _SECONDS)
        assert ended.status == "succeeded", ended.error

        def exported() -> Any:
            exports = client.fine_tuning.jobs.retrieve(job.id).model_extra["exports"]
            return exports if all(entry["status"] in ("succeeded", "failed") for entry in exports) else None

        columns = ("MB", "smaller", "speedup", "agreement", "rel. diff", "on rows", "accuracy")
        print(f"{'export':12}{''.join(f'{column:>11}' for column in columns)}")
        folders = os.environ.get("PRIVTUNE_MODELS_DIR", "")
        base = None
        if "adapter" in formats:
            base = base_path(BASES[case.base]) if case.base in BASES else Path(folders) / case.base
        model: Answers | None = None
        done = {entry["format"]: entry for entry in until(exported, _SECONDS, every=2)}
        for entry in (done[name] for name in formats):  # the model itself is the first
            figures = entry["metrics"]
            if figures is None:
                print(f"{entry['format']:12} {entry['error']['code']}")
                continue
            where = _fetch(http, ended.fine_tuned_model, entry, folder)
            told = answers(case.kind, entry["format"], where, base, case.test, case.job["task"])
            model = model or told
            print(
                f"{entry['format']:12}{figures['weights_bytes'] / 1e6:11.1f}{figures['compression']:11.2f}"
                f"{figures['speedup']:11.2f}{figures['agreement']:11.3f}{figures['relative_difference']:11.2g}"
                f"{np.mean(told.told == model.told):11.3f}{told.accuracy:11.3f}",
                flush=True,
            )


def _upload(client: Any, folder: Path, file: tuple[str, bytes], **body: str) -> str:
    path = folder / file[0]
    path.write_bytes(file[1])
    made = client.files.create(file=path, purpose="fine-tune", extra_body=body)
    return str(client.files.wait_for_processing(made.id, poll_interval=0.2).id)


def _fetch(http: httpx.Client, model: str, entry: Any, folder: Path) -> Path:
    tar = http.get(f"/models/{model}/exports/{entry['id']}/download").raise_for_status()
    target = folder / entry["format"]
    with tarfile.open(fileobj=io.BytesIO(tar.content)) as archive:
        archive.extractall(target, filter="data")
    return target / "model"


if __name__ == "__main__":
    main()
