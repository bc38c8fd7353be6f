"""`privtune serve` ends at the first interrupt, whenever it comes: also where Python swallows a KeyboardInterrupt."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import REPOSITORY

#: What Python raises in a weak reference's callback is printed and forgotten; and so it is in `__del__`.
INTERRUPTED = """
import signal, sys, weakref
import uvicorn
from app import cli, serve

owner, name, number = {"migrate": (serve.migrate, "upgrade", 15), "keeper": (serve.processes, "Keeper", 2),
    "application": (serve, "create_app", 15), "server": (uvicorn.Config, "get_loop_factory", 2)}[sys.argv.pop(1)]
real = getattr(owner, name)

class Kept: pass

def interrupted(*arguments, **options):
    kept = Kept()
    reference = weakref.ref(kept, lambda _: signal.raise_signal(number))
    del kept
    print("interrupted", flush=True)
    return real(*arguments, **options)

setattr(owner, name, interrupted)
sys.exit(cli.main())
"""


def serve(data_dir: Path, *command: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PRIVTUNE_")}
    return subprocess.Popen(
        [*command, "serve", "--no-worker", "--port", "0", "--data-dir", str(data_dir)],
        cwd=REPOSITORY,
        env={**environment, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ends(process: subprocess.Popen[str], seconds: float = 20.0) -> str:
    """What it had said, once it has ended; AssertionError where it does not."""
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"it did not end:\n{process.communicate()[0]}") from None
    assert process.returncode == 0, said
    return said


@pytest.mark.parametrize("where", ["migrate", "keeper", "application", "server"])
def test_an_interrupt_that_python_swallows_ends_the_service_all_the_same(tmp_path: Path, where: str) -> None:
    said = ends(serve(tmp_path / "data", sys.executable, "-c", INTERRUPTED, where))
    assert "interrupted" in said


def test_a_service_that_was_started_with_interrupts_ignored_hears_them_once_it_listens(tmp_path: Path) -> None:
    """A shell without job control ignores SIGINT for what it starts in the background."""
    ignoring = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", sys.executable, "-m", "app.cli"]
    process = serve(tmp_path / "data", *ignoring)
    assert process.stdout is not None
    assert any("listens on" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    ends(process)
