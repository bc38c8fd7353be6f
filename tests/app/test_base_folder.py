"""`privtune models`: fetching from a hub, here a small one on loopback, with as much of its API as is asked for."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.app.models.folders import make_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """One repository, org/small, at one commit. asked: the files that were."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.asked = folder, list[str]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path == f"/api/models/org/small/revision/{COMMIT}":
            names = [{"rfilename": file.name} for file in sorted(self.server.folder.iterdir())]
            answer = {"id": "org/small", "sha": COMMIT, "siblings": names, "tags": [], "private": False}
            return self._send(json.dumps(answer).encode(), body, "application/json")
        if path == f"/api/models/org/small/tree/{COMMIT}":
            files = sorted(self.server.folder.iterdir())
            tree = [{"type": "file", "oid": "0" * 40, "size": file.stat().st_size, "path": file.name} for file in files]
            return self._send(json.dumps(tree).encode(), body, "application/json")
        prefix = f"/org/small/resolve/{COMMIT}/"
        file = self.server.folder / path.removeprefix(prefix)
        if path.startswith(prefix) and file.is_file():
            self.server.asked.append(file.name)
            return self._send(file.read_bytes(), body)
        self.send_error(404)

    def _send(self, content: bytes, body: bool, kind: str = "application/octet-stream") -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content)))
        self.send_header("etag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("x-repo-commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = make_folder(tmp_path / "hub", pytorch_model__bin=b"pickle", modeling__py="run()")
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def privtune(hub: Hub, root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PRIVTUNE_"))}
    env |= {"PRIVTUNE_MODELS_DIR": str(root), "HF_HOME": str(root.parent / "hf"), "HF_ENDPOINT": hub.url}
    env |= {"PRIVTUNE_DATA_DIR": str(root.parent / "data"), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-m", "app.cli", "models", *arguments], env=env, capture_output=True, text=True
    )


def test_a_pinned_commit_is_fetched_without_its_code(hub: Hub, tmp_path: Path) -> None:
    root = tmp_path / "models"
    done = privtune(hub, root, "fetch", f"org/small@{COMMIT}")
    assert (done.returncode, done.stdout) == (0, "org/small\n"), done.stderr
    there = {path.name for path in (root / "org" / "small").iterdir()}
    assert there == {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(hub.asked) == there
    assert [path.name for path in root.iterdir()] == ["org"]
    shown = privtune(hub, root, "list")
    assert "org/small  bert" in shown.stdout
    again = privtune(hub, root, "fetch", f"org/small@{COMMIT}")
    assert again.returncode == 1
    assert "there already" in again.stderr


@pytest.mark.parametrize("model", ["org/small", "org/small@main", f"org/none@{COMMIT}", f"../x/small@{COMMIT}"])
def test_nothing_else_is_fetched(hub: Hub, tmp_path: Path, model: str) -> None:
    done = privtune(hub, tmp_path / "models", "fetch", model)
    assert done.returncode == 1, done.stdout
    assert done.stderr.splitlines()[-1].startswith("privtune: ")
    assert hub.asked == []
    assert not list((tmp_path / "models").glob("*")) if (tmp_path / "models").exists() else True


def test_a_model_that_would_be_refused_does_not_stay(hub: Hub, tmp_path: Path) -> None:
    (hub.folder / "model.safetensors").unlink()
    done = privtune(hub, tmp_path / "models", "fetch", f"org/small@{COMMIT}")
    assert done.returncode == 1
    assert "no_safetensors" in done.stderr
    assert list((tmp_path / "models").iterdir()) == []
