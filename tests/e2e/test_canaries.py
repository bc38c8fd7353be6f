"""A thousand unique strings in the rows, every error path provoked: none of them leaves the service.

Looked at: every response but an administrator's own look at the raw rows, every line that any process logged, every
command that the broker saw and all that it kept, every file of every bundle, reports, events, the ledger.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.processes import socket_folder
from tests.running import BASE_MODEL, TERMINAL, Running, until

#: No word of any model's vocabulary, no number, never twice.
MARK = f"zq{secrets.token_hex(4)}x"
ROWS = 250
TASK = {"type": "text_classification", "columns": {"text": "text", "label": "label"}, "labels": ["fine", "poor"]}


def canary(number: int) -> str:
    """One of the thousand: four of them in each row."""
    return f"{MARK}{number:04d}"


def rows() -> list[dict[str, str]]:
    """text, its label's neighbours, a person with two records each, a column whose name means nothing."""
    return [
        {
            "text": f"what {canary(4 * n)} wrote was {'good' if n % 2 else 'bad'}",
            "diagnosis": canary(4 * n + 1),
            "label": "fine" if n % 2 else "poor",
            "patient": canary(4 * (n // 2) + 2),
            "x;1": canary(4 * n + 3),
        }
        for n in range(ROWS)
    ]


def as_csv(records: list[dict[str, str]]) -> bytes:
    lines = [",".join(records[0]), *(",".join(record.values()) for record in records)]
    return ("\n".join(lines) + "\n").encode()


class Witness:
    """Sees every response, and every command that the broker gets."""

    def __init__(self, service: Running) -> None:
        key = (service.data_dir / "api_key").read_text().strip()
        self.told: list[tuple[str, bytes]] = []
        self.http = httpx.Client(
            base_url=f"{service.url}/v1",
            headers={"authorization": f"Bearer {key}"},
            timeout=60,
            event_hooks={"response": [self._hear]},
        )
        self.commands = bytearray()
        self._broker = service.broker()
        self._monitor = socket.socket(socket.AF_UNIX)
        self._monitor.connect(str(socket_folder(service.data_dir, "valkey") / "valkey.sock"))
        self._monitor.sendall(b"MONITOR\r\n")
        threading.Thread(target=self._listen, daemon=True).start()

    def _hear(self, response: httpx.Response) -> None:
        response.read()
        if not response.request.url.path.endswith("/content"):
            headers = str(response.headers.multi_items()).encode()
            where = f"{response.request.method} {response.request.url.path} {response.status_code}"
            self.told.append((where, headers + response.content))

    def _listen(self) -> None:
        with contextlib.suppress(OSError):  # it ends when the connection is closed
            while received := self._monitor.recv(1 << 16):
                self.commands += received

    def close(self) -> dict[bytes, bytes]:
        """What the broker keeps at the end."""
        kept = {key: self._broker.dump(key) or b"" for key in self._broker.scan_iter()}
        self._monitor.shutdown(socket.SHUT_RDWR)
        self._monitor.close()
        self._broker.close()
        self.http.close()
        return kept

    def upload(self, content: bytes, name: str = "rows.csv", **form: str) -> dict[str, Any]:
        """The file as it ends up."""
        answer = self.http.post("/files", files={"file": (name, content)}, data={"purpose": "fine-tune", **form})
        if answer.status_code != 200:
            return answer.json()
        path = f"/files/{answer.json()['id']}"
        return until(lambda: (file := self.http.get(path).json())["status"] != "uploaded" and file)

    def submit(self, file_id: str, **change: Any) -> httpx.Response:
        body = {
            "model": BASE_MODEL,
            "training_file": file_id,
            "task": TASK,
            "adaptation": {"type": "head"},
            "privacy": {"target_epsilon": 2.0, "target_delta": 1e-6},
            **change,
        }
        self.http.post("/fine_tuning/jobs/estimate", json=body)
        return self.http.post("/fine_tuning/jobs", json=body)

    def ended(self, job_id: str) -> dict[str, Any]:
        path = f"/fine_tuning/jobs/{job_id}"
        return until(lambda: (job := self.http.get(path).json())["status"] in TERMINAL and job, 120, every=0.2)

    def look_everywhere(self) -> None:
        """Every list, and everything in it."""
        self.http.get("/base_models")
        self.http.get("/tasks")
        self.http.get("/files", params={"limit": 100})
        for job in self.http.get("/fine_tuning/jobs", params={"limit": 100}).json()["data"]:
            path = f"/fine_tuning/jobs/{job['id']}"
            for tail in ("", "/events?limit=100", "/checkpoints"):
                self.http.get(path + tail)
            if job["status"] in TERMINAL:
                self.http.get(f"{path}/events", headers={"accept": "text/event-stream"})
        for model in self.http.get("/models").json()["data"]:
            path = f"/models/{model['id']}"
            self.http.get(path)
            if model["owned_by"].startswith("proj"):
                for tail in ("/privacy_report", "/download?format=tar", "/files"):
                    self.http.get(path + tail)
                for file in self.http.get(f"{path}/files").json()["data"]:
                    self.http.get(f"{path}/files/{file['path']}")
                self.http.get(f"{path}/privacy_report", headers={"accept": "text/html"})
        for budget in self.http.get("/privacy_budgets").json()["data"]:
            for tail in ("", "/entries?limit=100", "/timeline?limit=100", "/audit"):
                self.http.get(f"/privacy_budgets/{budget['id']}{tail}")

    def every_route(self, service: Running) -> None:
        """Each with ids that are nobody's and a body that no route takes."""
        paths = httpx.get(f"{service.url}/openapi.json").json()["paths"]
        for path, methods in paths.items():
            if path.startswith("/v1/"):
                for method in methods:
                    url = path.removeprefix("/v1").replace("{", "no-").replace("}", "")
                    body = (
                        {"json": {"name": [canary(1)], "model": {"x": canary(2)}}} if method in ("post", "put") else {}
                    )
                    answer = self.http.request(method, url, **body)
                    assert answer.status_code < 500, (method, path)


@pytest.fixture
def witness(service: Running) -> Iterator[Witness]:
    opened = Witness(service)
    yield opened
    opened.http.close()


#: (name, content, form): files that are refused, each with canaries where it is wrong.
def broken_files() -> list[tuple[str, bytes, dict[str, str]]]:
    good = as_csv(rows())
    lines = good.decode().split("\n")
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows()), table)
    objects = "\n".join(json.dumps(row) for row in rows()).encode()
    unit = {"privacy_unit": "patient"}
    return [
        ("few.csv", "\n".join([*lines[:9], canary(5), *lines[9:]]).encode(), {}),
        ("many.csv", "\n".join([*lines[:9], lines[9] + f",{canary(6)}", *lines[9:]]).encode(), {}),
        ("quotes.csv", good + f'"{canary(7)},'.encode(), {}),
        ("bytes.csv", good + b"\xff\xfe" + canary(8).encode() + b",a,b,c,d\n", {}),
        ("null.csv", good + canary(8).encode() + b"\0,a,b,c,d\n", {}),
        ("long.csv", good + (canary(9) * 200_000).encode() + b",a,fine,b,c\n", {}),
        ("header.csv", "\n".join(lines[1:]).encode(), {}),
        ("twice.csv", f"text,text\n{canary(9)},{canary(10)}\n".encode(), {}),
        ("unit.csv", good + f"{canary(11)},a,fine,,c\n".encode(), unit),
        ("padded.csv", good + f"{canary(12)},a,fine, {canary(13)},c\n".encode(), unit),
        ("nowhere.csv", "\n".join(lines[:200]).encode(), {"privacy_unit": "doctor"}),
        ("torn.jsonl", objects + b'\n{"text": "' + canary(14).encode(), {}),
        ("list.jsonl", objects + f'\n["{canary(15)}"]'.encode(), {}),
        ("types.jsonl", objects + f'\n{{"text": {{"{canary(16)}": ["{canary(17)}"]}}, "label": 3}}'.encode(), {}),
        ("torn.parquet", table.getvalue()[:-200], {}),
        ("torn.csv.gz", gzip.compress(good)[:-40], {}),
        ("nothing.bin", canary(18).encode() + bytes(range(256)), {}),
    ]


def test_no_canary_leaves(service: Running, witness: Witness) -> None:
    http = witness.http
    for name, content, form in broken_files():
        file = witness.upload(content, name, **form)
        if file.get("status") == "processed":  # wrong only for a job
            witness.submit(file["id"], task={"type": "text_classification"})
        elif "id" in file:
            assert file["error"]["code"], file
            assert witness.submit(file["id"]).json()["error"]["code"] == "file_failed"

    file = witness.upload(as_csv(rows()), privacy_unit="patient")
    assert (file.get("status"), file.get("num_units")) == ("processed", ROWS // 2), file
    http.get(f"/files/{file['id']}/units")
    raw = http.get(f"/files/{file['id']}/content")  # an admin's right
    assert raw.text.count(MARK) == 4 * ROWS
    submitter = _key(service, "submit")
    with httpx.Client(base_url=http.base_url, headers=submitter, event_hooks=http.event_hooks) as other:
        assert other.get(f"/files/{file['id']}/content").status_code == 403
        for column in ("diagnosis", "patient", "x;1"):
            body = {"model": BASE_MODEL, "training_file": file["id"]}
            guess = {"columns": {"text": "text", "label": column}}
            for task in (guess, {**guess, "labels": ["fine", "poor"]}):
                assert other.post("/fine_tuning/jobs", json={**body, "task": task}).status_code == 400
    for change in (
        {"task": {**TASK, "labels": ["fine", "wrong"]}},
        {"task": {**TASK, "columns": {"text": "prose", "label": "label"}}},
        {"validation_file": file["id"], "evaluation": {"split": 0.2}},
        {"privacy": {"privacy_unit": {"column": "diagnosis"}}},
        {"privacy": {"target_epsilon": 900.0}},
        {"hyperparameters": {"batch_size": 10**6}},
    ):
        assert witness.submit(file["id"], **change).status_code == 400

    trained = witness.submit(file["id"], checkpoints={"count": 1}, evaluation={"split": 0.2}).json()
    assert witness.ended(trained["id"])["status"] == "succeeded"

    # Killed, taken up again, cancelled.
    longer = {"adaptation": {"type": "bitfit"}, "hyperparameters": {"n_epochs": 200, "batch_size": 20}}
    cancelled = witness.submit(file["id"], **longer, evaluation="none").json()
    begun = until(lambda: [e for e in service.logged("trainer_begins") if e["job_id"] == cancelled["id"]])
    os.kill(begun[0]["pid"], signal.SIGKILL)
    until(lambda: len([e for e in service.logged("trainer_begins") if e["job_id"] == cancelled["id"]]) > 1)
    http.post(f"/fine_tuning/jobs/{cancelled['id']}/cancel")
    assert witness.ended(cancelled["id"])["status"] == "cancelled"

    # Rows that are not those of the plan: what lies in the store was changed.
    (stored,) = (service.data_dir / "storage").rglob(f"{file['id']}/*.parquet")
    pq.write_table(pa.Table.from_pylist(rows()[:-1]), stored)
    failed = witness.submit(file["id"], evaluation="none").json()
    assert witness.ended(failed["id"])["error"]["code"] == "data_mismatch"

    witness.every_route(service)
    witness.look_everywhere()
    for model in http.get("/models").json()["data"]:
        if model.get("job") == trained["id"]:
            assert http.delete(f"/models/{model['id']}").status_code == 200
    assert http.delete(f"/files/{file['id']}").status_code == 200

    kept = witness.close()
    assert len(witness.told) > 150
    assert [where for where, told in witness.told if MARK.encode() in told] == []
    assert {task in witness.commands for task in (b"process_file", b"train_job")} == {True}
    assert MARK.encode() not in witness.commands
    bodies = re.findall(rb'body\\?": \\?"([A-Za-z0-9+/=]+)', witness.commands)
    assert len(bodies) > 20
    assert [body for body in bodies if MARK.encode() in base64.b64decode(body)] == []
    assert [key for key, value in kept.items() if MARK.encode() in key + value] == []
    assert [line for line in service.output if MARK in line] == []
    broker: list[Path] = [path for path in (service.data_dir / "valkey").rglob("*") if path.is_file()]
    assert any("aof" in path.name for path in broker)
    assert [path for path in broker if MARK.encode() in path.read_bytes()] == []
    assert list((service.data_dir / "jobs").glob("job-*/data/*")) == []


def _key(service: Running, scopes: str) -> dict[str, str]:
    """The header of a new key of less than an admin's rights."""
    command = [sys.executable, "-m", "app.cli", "keys", "create", "--name", "ward", "--scopes", scopes]
    done = subprocess.run(
        [*command, "--data-dir", str(service.data_dir)], capture_output=True, text=True, timeout=60, check=True
    )
    return {"authorization": f"Bearer {next(word for word in done.stdout.split() if word.startswith('pt-'))}"}
