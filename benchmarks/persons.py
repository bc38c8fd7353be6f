"""A person as the privacy unit on real conversations: which of four questions a chat is about, ε for each sender.

    pip install --no-deps chitchat-dataset==0.9.0
    python -m benchmarks.persons [--epsilon 8] [--limit 0]

The data: 258,145 messages of 1,315 volunteers (Myers, Chitchat Dataset, 2020; MIT). The question that a conversation
began with was shown to both by the program: it is public. Messages of five words or more of four such conversations;
some senders wrote two of them, some hundreds. Held-out accuracy is released, noised, averaged over persons.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from tests.running import BASE_MODEL, Running, until, wait_for_job

PACKAGE = "chitchat_dataset"
TOPICS = {
    "If money were no object, how would you spend your time?": "money",
    "What superpower do you wish you had, and why?": "superpower",
    "What's the last film that truly made an impression on you?": "film",
    "Who is your modern-day hero?": "hero",
}
SHORTEST = 5


def installed() -> bool:
    """Whether the data is there; the package is found, never imported."""
    return importlib.util.find_spec(PACKAGE) is not None


def messages() -> list[dict[str, str]]:
    """text, topic, sender."""
    found = importlib.util.find_spec(PACKAGE)
    assert found is not None
    assert found.origin is not None
    conversations = json.loads((Path(found.origin).parent / "dataset.json").read_text(encoding="utf-8"))
    return [
        {"text": " ".join(message["text"].split()), "topic": topic, "sender": message["sender"]}
        for conversation in conversations.values()
        if (topic := TOPICS.get(conversation.get("prompt"))) is not None
        for turn in conversation["messages"]
        for message in turn
        if len(message["text"].split()) >= SHORTEST
    ]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    """As an upload has it."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def train(service: Running, path: Path, epsilon: float) -> tuple[Any, dict[str, Any]]:
    """The finished job on that file, and its model."""
    with service.client() as client:
        unit: Any = {"privacy_unit": {"column": "sender"}}
        uploaded = client.files.create(file=path, purpose="fine-tune", extra_body=unit)
        file = client.files.wait_for_processing(uploaded.id, poll_interval=0.2, max_wait_seconds=300)
        assert file.status == "processed", file
        job = client.fine_tuning.jobs.create(
            model=BASE_MODEL,
            training_file=file.id,
            extra_body={
                "task": {"columns": {"text": "text", "label": "topic"}, "labels": sorted(TOPICS.values())},
                "privacy": {"target_epsilon": epsilon, "target_delta": 1e-4},
                "evaluation": {"split": 0.2},
            },
        )
        job = wait_for_job(client, job.id, 1800)
        assert job.status == "succeeded", job.error
        headers = {"authorization": f"Bearer {client.api_key}"}
        url = f"{service.url}/v1/models/{job.fine_tuned_model}"
        return job, until(lambda: httpx.get(url, headers=headers, timeout=60).json())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--limit", type=int, default=0, help="only so many messages; 0: all")
    options = parser.parse_args()
    if not installed():
        raise SystemExit("pip install --no-deps chitchat-dataset==0.9.0")
    rows = messages()[: options.limit or None]
    per_person = Counter(row["sender"] for row in rows)
    classes = Counter(row["topic"] for row in rows)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "chat.csv", rows)
        with Running(Path(folder) / "data", PRIVTUNE_BUDGET_EPSILON="20", PRIVTUNE_BUDGET_DELTA="1e-4") as service:
            began = time.monotonic()
            job, model = train(service, path, options.epsilon)
            seconds = time.monotonic() - began
    privacy, metrics = job.model_extra["privacy"], model["metrics"]
    fewest, most = min(per_person.values()), max(per_person.values())
    largest = max(classes.values()) / len(rows)
    print(f"{len(rows)} messages of {len(per_person)} senders, {fewest} to {most} each")
    print(f"the largest class: {largest:.3f} of the messages")
    print(f"epsilon {privacy['epsilon']:.3f} at delta {privacy['target_delta']:g} for each sender; {seconds:.0f} s")
    accuracy = "hidden by the noise"
    if "accuracy" in metrics:
        low, high = metrics["accuracy_interval_95"]
        accuracy = f"{metrics['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
    print(f"released accuracy over {metrics['num_units']} held-out senders: {accuracy}")


if __name__ == "__main__":
    main()
