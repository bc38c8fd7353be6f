"""The main job on real input, from upload to download: `make demo`.

Starts the embedded service in .demo/, uploads 10,568 movie snippets, fine-tunes a MiniLM classifier on them with (ε, δ)
differential privacy through the unmodified `openai` client, shows what was released, downloads the model, loads it with
plain transformers and classifies three sentences.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

HERE = Path(__file__).resolve().parent
DATA = HERE / "movie_snippets.csv"
FOLDER = HERE.parent / ".demo"
BASE_MODEL = "all-MiniLM-L6-v2"
EPSILON = 3.0
SENTENCES = (
    "A warm, funny and beautifully acted film that stays with you for days.",
    "Two hours of my life that I will never get back.",
    "The plot creaks, but the leads are a joy to watch.",
)


def main() -> int:
    """Runs the demo; 0 when every step succeeded."""
    began = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    say(f"Starting the service on 127.0.0.1:{port} (SQLite, Valkey and one worker in {FOLDER.name}/)")
    with open(FOLDER / "serve.log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "serve", "--port", str(port), "--data-dir", str(FOLDER / "data")],
            cwd=HERE.parent,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        client = wait_until_ready(server, f"http://127.0.0.1:{port}")
        return run_job(client, began)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=60)


def run_job(client: OpenAI, began: float) -> int:
    """Upload, train, report, download, classify."""
    file = client.files.create(file=DATA, purpose="fine-tune")
    file = client.files.wait_for_processing(file.id, poll_interval=0.2, max_wait_seconds=120)
    say(f"Uploaded {DATA.name}: {file.id}, {file.bytes:,} bytes, {file.status}")

    privacy = {"target_epsilon": EPSILON, "target_delta": 1e-5}
    body: dict[str, Any] = {"model": BASE_MODEL, "training_file": file.id}
    plan: Any = client.post("/fine_tuning/jobs/estimate", body={**body, "privacy": privacy}, cast_to=object)
    cost = plan["privacy"]
    say(
        f"The plan, before anything is spent: ε = {cost['epsilon']:.3f} at δ = {cost['target_delta']:g}, "
        f"noise multiplier {cost['noise_multiplier']:.3f}, {cost['num_steps']} steps, {cost['num_units']:,} records"
    )

    job = client.fine_tuning.jobs.create(**body, suffix="demo", extra_body={"privacy": privacy})
    say(f"Submitted {job.id}")
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(0.5)
        job = client.fine_tuning.jobs.retrieve(job.id)
        show_progress(job)
    print()
    if job.status != "succeeded" or job.fine_tuned_model is None:
        print(f"The job {job.status}: {job.error}", file=sys.stderr)
        return 1

    model = client.models.retrieve(job.fine_tuned_model)
    bundle = httpx.get(
        f"{client.base_url}models/{model.id}/download",
        params={"format": "tar"},
        headers={"Authorization": f"Bearer {client.api_key}"},
        timeout=120,
    ).raise_for_status()
    target = FOLDER / "model"
    with tarfile.open(fileobj=io.BytesIO(bundle.content)) as archive:
        archive.extractall(target, filter="data")
    show_table(job, json.loads(next(target.rglob("metrics.json")).read_text()), time.monotonic() - began)
    say(f"Downloaded {model.id}: {len(bundle.content):,} bytes, ETag {bundle.headers['etag'][:14]}…")
    classify(next(target.rglob("config.json")).parent)
    say(f"All of it took {time.monotonic() - began:.0f} seconds. The model is in {target.relative_to(HERE.parent)}/")
    return 0


def wait_until_ready(server: subprocess.Popen[bytes], url: str) -> OpenAI:
    """A client with the first start's admin key, once the service answers."""
    for _ in range(300):
        if server.poll() is not None:
            raise SystemExit(f"The service stopped:\n{(FOLDER / 'serve.log').read_text()[-3000:]}")
        try:
            httpx.get(f"{url}/readyz").raise_for_status()
            return OpenAI(base_url=f"{url}/v1", api_key=(FOLDER / "data" / "api_key").read_text().strip())
        except (httpx.HTTPError, OSError):
            time.sleep(0.2)
    raise SystemExit("The service did not become ready within a minute.")


def show_progress(job: Any) -> None:
    """One line, redrawn: status, steps, ε spent so far."""
    progress = (job.model_extra or {}).get("progress") or {}
    step, steps = progress.get("step", 0), progress.get("num_steps", 0)
    filled = round(30 * step / steps) if steps else 0
    spent = ((job.model_extra or {}).get("privacy") or {}).get("epsilon_spent")
    line = f"  [{'█' * filled}{'·' * (30 - filled)}] {job.status:<16} step {step}/{steps or '?'}"
    print(f"\r{line}  ε {spent if spent is None else round(spent, 3)}   ", end="", flush=True)


def show_table(job: Any, metrics: dict[str, Any], seconds: float) -> None:
    """What the job spent and what it released."""
    privacy = job.model_extra["privacy"]
    rows = [
        ("ε spent (limit of this job)", f"{privacy['epsilon_spent']:.3f} ({privacy['target_epsilon']})"),
        ("δ", f"{privacy['target_delta']:g}"),
        ("noise multiplier", f"{privacy['noise_multiplier']:.3f}"),
        ("sample rate", f"{privacy['sample_rate']:.4f}"),
        ("steps", privacy["num_steps"]),
        ("accuracy (noised, charged)", f"{metrics['accuracy']:.3f}"),
        ("F1, macro (noised, charged)", f"{metrics['f1_macro']:.3f}"),
        ("job, seconds", f"{job.finished_at - job.created_at}"),
    ]
    print()
    for name, value in rows:
        print(f"  {name:<30} {value}")
    print()


def classify(folder: Path) -> None:
    """Loads the bundle with plain transformers, as any user would."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import pipeline
    from transformers.utils import logging

    logging.disable_progress_bar()

    classifier = pipeline("text-classification", model=str(folder), tokenizer=str(folder), device=-1)
    for sentence, answer in zip(SENTENCES, classifier(list(SENTENCES)), strict=True):
        print(f"  {answer['label']:<9} {answer['score']:.2f}  {sentence}")
    print()


def say(line: str) -> None:
    """One line of what happens."""
    print(f"· {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
