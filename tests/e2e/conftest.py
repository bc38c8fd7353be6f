"""One running service for the whole room, and one job that was trained on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.running import BASE_MODEL, Running, wait_for_job, write_snippets

#: Several jobs fit into it; each still has its own ε.
BUDGET = {"PRIVTUNE_BUDGET_EPSILON": "60"}


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`privtune serve`, embedded."""
    with Running(tmp_path_factory.mktemp("service") / "data", PRIVTUNE_THREADS="1", **BUDGET) as running:
        yield running


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Running]:
    """`privtune serve` with the bases in the folder `models`, a fixture of the module that asks for it."""
    settings = {"PRIVTUNE_THREADS": "1", "PRIVTUNE_BUDGET_EPSILON": "1000", "PRIVTUNE_MODELS_DIR": str(models)}
    with Running(tmp_path_factory.mktemp("service") / "data", **settings) as started:
        yield started


@pytest.fixture(scope="session")
def client(service: Running) -> Iterator[openai.OpenAI]:
    """The unmodified client with the admin key."""
    with service.client() as opened:
        yield opened


@pytest.fixture(scope="session")
def http(service: Running, client: openai.OpenAI) -> Iterator[httpx.Client]:
    """Plain HTTP with the admin key."""
    headers = {"authorization": f"Bearer {client.api_key}"}
    with httpx.Client(base_url=f"{service.url}/v1", headers=headers, timeout=60) as opened:
        yield opened


@pytest.fixture(scope="session")
def snippets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 rows with text and label."""
    return write_snippets(tmp_path_factory.mktemp("data") / "snippets.csv", 400)


@pytest.fixture(scope="session")
def dataset(client: openai.OpenAI, snippets: Path) -> Any:
    """Them, uploaded and processed."""
    file = client.files.create(file=snippets, purpose="fine-tune")
    return client.files.wait_for_processing(file.id, poll_interval=0.1, max_wait_seconds=60)


@pytest.fixture(scope="session")
def trained(client: openai.OpenAI, dataset: Any) -> Any:
    """A job that succeeded, with metrics."""
    job = client.fine_tuning.jobs.create(
        model=BASE_MODEL,
        training_file=dataset.id,
        suffix="snippets",
        seed=7,
        metadata={"team": "ward-3"},
        extra_body={
            "task": {"type": "text_classification", "labels": ["negative", "positive"]},
            "adaptation": {"type": "head"},
            "privacy": {"target_epsilon": 8.0, "target_delta": 1e-5},
            "evaluation": {"split": 0.2},
        },
    )
    job = wait_for_job(client, job.id)
    assert job.status == "succeeded", job.error
    return job
