"""The same code on PostgreSQL, a Redis over TCP and S3, with the API and two workers as processes of their own."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import openai
import pytest
import redis
from moto.server import ThreadedMotoServer

from app import processes, tether
from tests.postgres import Postgres
from tests.running import BASE_MODEL, REPOSITORY, Running, until, wait_for_job, write_snippets

KEY = "an-operators-own-key-for-this-test"


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[str]:
    """A Valkey on a loopback port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    embedded = processes.valkey(tmp_path / "valkey", processes.socket_folder(tmp_path, "valkey") / "v.sock")
    argv = list(embedded.argv)
    argv[argv.index("--port") + 1] = str(port)
    server = tether.popen(argv, env=embedded.env, output=subprocess.DEVNULL)

    def answers() -> bool:
        try:
            return bool(redis.Redis(port=port).ping())
        except redis.ConnectionError:
            return False

    until(answers, 20)
    yield f"redis://127.0.0.1:{port}/0"
    tether.kill_group(server)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An S3 bucket, as its own client sees it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    opened = boto3.resource("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="models")
    yield opened
    server.stop()


def test_a_job_on_postgresql_redis_and_s3(tmp_path: Path, postgres: Postgres, broker: str, bucket: Any) -> None:
    shared = {
        "DATABASE_URL": postgres.create("scale"),
        "REDIS_URL": broker,
        "STORAGE_URL": f"s3://{bucket.name}/privtune",
        "PRIVTUNE_API_KEY": KEY,
        "PRIVTUNE_SECRET_KEY": "5a" * 32,
        "PRIVTUNE_THREADS": "1",
    }
    environment = {**os.environ, **shared}
    migrate = [sys.executable, "-m", "app.cli", "migrate", "--data-dir", str(tmp_path / "migrate")]
    subprocess.run(migrate, cwd=REPOSITORY, env=environment, check=True, timeout=60)
    with Running(tmp_path / "api", "--no-worker", **shared) as service:
        assert not any("valkey-server" in command for command in service.tree().values())
        workers = [
            subprocess.Popen(
                [sys.executable, "-m", "app.cli", "worker", "--queues", queue, "--data-dir", str(tmp_path / queue)],
                cwd=REPOSITORY,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for queue in ("training", "files")
        ]
        try:
            with openai.OpenAI(base_url=f"{service.url}/v1", api_key=KEY) as client:
                file = client.files.create(file=write_snippets(tmp_path / "rows.csv", 200), purpose="fine-tune")
                job = client.fine_tuning.jobs.create(
                    model=BASE_MODEL, training_file=file.id, extra_body={"adaptation": {"type": "head"}}
                )
                ended = wait_for_job(client, job.id)
                assert ended.status == "succeeded", ended.error
                url = f"{service.url}/v1/models/{ended.fine_tuned_model}/download?format=zip"
                headers = {"authorization": f"Bearer {KEY}"}
                whole = httpx.get(url, headers=headers, timeout=60).raise_for_status()
                assert whole.headers["etag"] == f'"{hashlib.sha256(whole.content).hexdigest()}"'
                part = httpx.get(url, headers={**headers, "range": "bytes=1000-2999"}, timeout=60)
                assert part.content == whole.content[1000:3000]
            keys = [entry.key for entry in bucket.objects.all()]
            assert any(key.endswith("model.safetensors") for key in keys)
            assert not any("checkpoints" in key for key in keys)
            assert not (tmp_path / "api" / "storage").exists()
            assert list((tmp_path / "training" / "jobs").glob("job-*/spec.json")) == []
        finally:
            for worker in workers:
                worker.send_signal(signal.SIGTERM)
            assert [worker.wait(30) for worker in workers] == [0, 0]
