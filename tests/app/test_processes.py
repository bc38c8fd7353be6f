"""Children that never outlive their parent, and are kept running while it lives."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from app import processes, tether
from app.processes import Keeper, Service

PARENT = """
import sys, time
from app import tether
child = tether.popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_a_child_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, env=tether.importable(os.environ), cwd=tmp_path
    ) as parent:
        assert parent.stdout is not None
        lines = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
        child = int(next(line for line in lines if line != b"up"))
        assert alive(child)
        parent.kill()
    until(lambda: not alive(child))


def test_a_child_has_its_own_session_and_leaves_no_core_file() -> None:
    code = "import os, resource; print(os.getsid(0) == os.getpid(), resource.getrlimit(resource.RLIMIT_CORE)[1])"
    child = tether.popen([sys.executable, "-c", code], output=subprocess.PIPE)
    out, _ = child.communicate(timeout=10)
    assert out.split() == [b"True", b"0"]


def test_kill_group_takes_grandchildren_along() -> None:
    code = "import subprocess; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    child = tether.popen([sys.executable, "-c", code], output=subprocess.PIPE)
    assert child.stdout is not None
    grandchild = int(child.stdout.readline())
    tether.kill_group(child)
    child.stdout.close()
    assert child.returncode == -signal.SIGKILL
    until(lambda: not alive(grandchild))


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Callable[..., Keeper]]:
    keepers: list[tuple[Keeper, threading.Thread]] = []

    def keep(*services: Service) -> Keeper:
        keeper = Keeper(services)
        thread = threading.Thread(target=keeper.run)
        thread.start()
        keepers.append((keeper, thread))
        keeper.wait_until_up()
        return keeper

    yield keep
    for keeper, thread in keepers:
        keeper.stop()
        thread.join()


def test_what_dies_is_started_again_and_what_is_stopped_is_not(tmp_path: Path, kept: Callable[..., Keeper]) -> None:
    pids = tmp_path / "pids"
    code = f"import os, time; open({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\n'); time.sleep(60)"
    keeper = kept(Service("sleeper", [sys.executable, "-c", code], dict(os.environ)))

    def started() -> list[int]:
        return [int(line) for line in pids.read_text().split()] if pids.exists() else []

    until(lambda: len(started()) == 1)
    os.kill(started()[0], signal.SIGKILL)
    until(lambda: len(started()) == 2)
    assert alive(started()[1])
    keeper.stop()
    until(lambda: not alive(started()[1]))
    assert len(started()) == 2


def test_a_service_that_ignores_sigterm_is_killed(tmp_path: Path, kept: Callable[..., Keeper]) -> None:
    ready = tmp_path / "ready"
    code = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"open({str(ready)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    )
    keeper = kept(Service("stubborn", [sys.executable, "-c", code], dict(os.environ), stop_seconds=0.2))
    until(lambda: ready.exists() and ready.read_text() != "")
    pid = int(ready.read_text())
    keeper.stop()
    until(lambda: not alive(pid))


def test_valkey_keeps_its_queue_over_a_kill(tmp_path: Path, kept: Callable[..., Keeper]) -> None:
    path = processes.socket_folder(tmp_path, "valkey") / "valkey.sock"
    service = processes.valkey(tmp_path / "valkey", path)
    kept(service)
    with redis.Redis(unix_socket_path=str(path)) as client:
        client.rpush("hints", "a")
        client.execute_command("WAITAOF", 1, 0, 2000)
        pid = client.info("server")["process_id"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    os.kill(pid, signal.SIGKILL)

    def again() -> bool:
        try:
            with redis.Redis(unix_socket_path=str(path)) as client:
                return client.lrange("hints", 0, -1) == [b"a"]
        except redis.ConnectionError:
            return False

    until(again)


def test_a_folder_too_deep_for_a_socket_moves_to_a_short_private_one(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    folder = processes.socket_folder(deep, "jobs")
    assert len(str(folder)) <= 80
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert processes.socket_folder(deep, "jobs") == folder
    assert processes.socket_folder(tmp_path / ("d" * 60) / ("f" * 60), "jobs") != folder
    folder.rmdir()
    folder.parent.rmdir()


def test_a_folder_that_is_a_link_to_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "jobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError):
        processes.socket_folder(tmp_path, "jobs")


STOPPED = """
import random, signal
from app import processes

processes._LOOK = 1e-5  # so that many of the signals come while it goes to sleep, or wakes up
for _ in range(1000):
    keeper = processes.Keeper([])
    signal.signal(signal.SIGALRM, lambda *_: keeper.stop())
    signal.setitimer(signal.ITIMER_REAL, random.uniform(2e-4, 1e-3))
    keeper.run()
"""


def test_a_keeper_is_stopped_by_a_signal_of_its_own_thread_whenever_that_comes() -> None:
    subprocess.run([sys.executable, "-c", STOPPED], env=tether.importable(os.environ), check=True, timeout=20)
