"""`privtune serve` itself: its first start, and the starts that it refuses."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.running import REPOSITORY, Running

KEY = "operators-own-key-of-thirty-chars"


def attempt(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A start that ends by itself."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PRIVTUNE_")}
    return subprocess.run(
        [sys.executable, "-m", "app.cli", "serve", *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_first_start_shows_its_key_once_and_refuses_a_second_service_beside_it(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with Running(data_dir, "--no-worker") as service:
        key = (data_dir / "api_key").read_text().strip()
        assert stat.S_IMODE((data_dir / "api_key").stat().st_mode) == 0o600
        assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700
        for path in data_dir.rglob("*"):
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 or path.is_socket(), path
        assert "".join(service.output).count(key) == 1
        answer = httpx.get(f"{service.url}/v1/files", headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == 200
        refused = attempt("--port", "0", "--data-dir", str(data_dir))
        assert refused.returncode == 1
        assert "another `privtune serve` uses" in refused.stderr
        assert "Traceback" not in refused.stderr
        assert service.stop(signal.SIGTERM) == 0
    data_dir.chmod(0o755)  # as an older version left them
    (data_dir / "privtune.db").chmod(0o644)
    with Running(data_dir, "--no-worker") as service:
        assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700
        assert stat.S_IMODE((data_dir / "privtune.db").stat().st_mode) == 0o600
        assert key not in "".join(service.output)
        assert httpx.get(f"{service.url}/v1/files", headers={"authorization": f"Bearer {key}"}).status_code == 200


def test_a_port_in_use_is_one_clear_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = attempt("--port", str(port), "--data-dir", str(tmp_path / "data"))
    assert refused.returncode == 1
    assert refused.stderr.strip() == f"privtune: cannot listen on 127.0.0.1:{port}: Address already in use."


def test_a_key_from_the_environment_is_the_first_one_and_is_not_written_down(tmp_path: Path) -> None:
    with Running(tmp_path / "data", "--no-worker", PRIVTUNE_API_KEY=KEY) as service:
        assert not (tmp_path / "data" / "api_key").exists()
        assert KEY not in "".join(service.output)
        answer = httpx.get(f"{service.url}/v1/files", headers={"authorization": f"Bearer {KEY}"})
        assert answer.status_code == 200


@pytest.mark.parametrize("depth", [120])
def test_a_data_folder_too_deep_for_a_socket(tmp_path: Path, depth: int) -> None:
    with Running(tmp_path / ("d" * depth), "--no-worker") as service:
        with service.broker() as broker:
            assert broker.ping()
