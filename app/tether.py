"""Starts a program that dies with its parent, even when the parent is killed with -9 (Linux: PR_SET_PDEATHSIG).

The program is started through this file, run as a script: it asks the kernel for the signal and becomes the program.
So nothing runs between fork and exec in a parent that has threads. The kernel sends the signal when the *thread* that
started the child ends: start children from a thread that lives as long as they should.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4

#: The folder from which `app` and `worker` are imported.
SOURCE = Path(__file__).resolve().parent.parent


def popen(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    output: int | IO[bytes] | None = None,
) -> subprocess.Popen[bytes]:
    """A child in a session of its own (a terminal's Ctrl-C reaches only the parent) that leaves no core file.

    output: where standard output and error both go; None: where the parent's go. Raises OSError like `Popen`.
    """
    streams: dict[str, Any] = {} if output is None else {"stdout": output, "stderr": subprocess.STDOUT}
    return subprocess.Popen(  # noqa: S603 - the callers' own programs, never a user's text
        [sys.executable, "-I", "-S", __file__, str(os.getpid()), *argv],
        env=env,
        cwd=cwd,
        stdin=stdin,
        start_new_session=True,
        **streams,
    )


def python(*arguments: str) -> list[str]:
    """This interpreter with these arguments; the current folder is no place to import from."""
    return [sys.executable, "-P", *arguments]


def importable(env: Mapping[str, str]) -> dict[str, str]:
    """`env` with a PYTHONPATH by which a child imports what this process imports."""
    return {**env, "PYTHONPATH": os.pathsep.join(filter(None, (str(SOURCE), env.get("PYTHONPATH"))))}


def become_unreadable() -> None:
    """Closes this process's memory and environment, with all credentials in it, to other processes of its user.

    An exec undoes it, so every program calls it for itself. Root with CAP_SYS_PTRACE reads on. Linux only.
    """
    if sys.platform == "linux" and ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError("PR_SET_DUMPABLE was refused")


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kills the child and all that it started in its session, and reaps it."""
    if process.returncode is None:  # not reaped: the number is still its own
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _become(parent: int, argv: list[str]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit(1)  # it died before it could be heard
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.execvp(argv[0], argv)  # noqa: S606


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
