"""The trainer as the supervisor sees it: a child process with a folder, a clean environment and a socket of messages.

Every trainer starts as a spare: it imports torch and waits. The job comes as one line on its standard input, the folder
and the secret key, so that the key is in no file, argument or environment. A spare that waits when a job is claimed
saves the seconds of the import.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import structlog

from app import tether
from worker.job_folder import JobFolder
from worker.trainer.landlock import Reach
from worker.trainer.messages import Allowed, Message, Rows, Stop, decode, encode
from worker.trainer.spec import LOG_FILE, SOCKET_FILE

log = structlog.get_logger(__name__)

#: All that a trainer's environment takes over from the worker's: no database, broker, store or proxy is named in it.
PASSED_ON = (
    "CUDA_VISIBLE_DEVICES",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "NVIDIA_VISIBLE_DEVICES",
    "PATH",
    "PYTHONPATH",
)

PROGRAM = tuple(tether.python("-m", "worker.trainer"))

_NOTHING = Reach()

#: The parts of a traceback that name code and hold no values.
_FRAME = re.compile(r'  File "([^"]+)", line (\d+), in ([A-Za-z_<][A-Za-z0-9_>]*)')
_EXCEPTION = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*(?=:|$)")

_LONGEST_LINE = 1 << 20
_CHUNK = 1 << 16


class BadMessage(RuntimeError):
    """The trainer said something that is no message."""


class TrainerGone(RuntimeError):
    """The trainer ended, and everything that it said has been read."""


class TrainerProcess:
    """One trainer. Only the thread that starts it may read; `kill` is safe from any."""

    def __init__(
        self, root: Path, *, reach: Reach = _NOTHING, threads: int = 0, program: Sequence[str] = PROGRAM
    ) -> None:
        """Starts a spare in a fresh folder under `root`, which is closed to it but for that, as all is but for `reach`.
        Raises OSError."""
        self._reach, self._reached = reach, reach.identity()
        self.folder = JobFolder.create(root)
        try:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(self.folder.path / SOCKET_FILE))
            self._listener.listen(1)
            self._listener.setblocking(False)
            with open(self.folder.path / LOG_FILE, "ab") as output:
                self.process = tether.popen(
                    program,
                    env=_environment(self.folder.path, threads) | reach.to_env(),
                    cwd=self.folder.path,
                    stdin=subprocess.PIPE,
                    output=output,
                )
        except BaseException:
            self.folder.remove()
            raise
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._connection: socket.socket | None = None
        self._pending = b""
        self._ended = False

    def waits(self) -> bool:
        """Whether it still runs, and what it reaches is still what lies there: a spare may have died while nobody
        looked, or an operator have put another folder of models in the place of the one that it knows."""
        return self.process.poll() is None and self._reach.identity() == self._reached

    def begin(self, key: bytes) -> None:
        """Hands over the job that lies in the folder. A trainer that is gone is noticed by `read`."""
        line = json.dumps({"folder": str(self.folder.path), "key": key.hex()}).encode() + b"\n"
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line)
            self.process.stdin.close()
        except BrokenPipeError:
            log.warning("trainer_gone_before_start")

    def read(self, seconds: float) -> list[Message]:
        """The next messages, in order; an empty list after `seconds` without one.

        Raises TrainerGone when it has ended and all is read, BadMessage on anything that is no message.
        """
        deadline = time.monotonic() + seconds
        while True:
            *lines, self._pending = self._pending.split(b"\n")
            if lines:
                return [_decoded(line) for line in lines]
            if len(self._pending) > _LONGEST_LINE:
                raise BadMessage("a line without an end")
            if self._ended:
                raise TrainerGone
            if self._connection is None and self.process.poll() is not None and not self._selector.select(0):
                raise TrainerGone  # it never connected; one that did, and ended before we looked, is still read
            left = deadline - time.monotonic()
            # Without a connection nothing wakes us when the process ends: look again soon.
            ready = self._selector.select(max(0.0, left if self._connection else min(left, 0.1)))
            if not ready and left <= 0:
                return []
            if ready:
                self._receive()

    def stop(self) -> None:
        """Asks it to finish the step at hand and answer Stopped."""
        if self._connection is not None:
            try:
                self._connection.sendall(encode(Stop()))
            except OSError:
                log.info("trainer_gone_before_stop")

    def tell(self, message: Rows | Allowed) -> None:
        """Answers what it waits for."""
        if self._connection is not None:
            try:
                self._connection.sendall(encode(message))
            except OSError:
                log.info("trainer_gone_before_it_was_told")

    def kill(self) -> None:
        """Ends it at once, with all that it started."""
        tether.kill_group(self.process)

    def status(self) -> int | None:
        """Of one that is gone: its exit status, a signal's negative. None where it still runs: its socket closes first,
        but not by more than a second."""
        try:
            return self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            return None

    def where_it_failed(self) -> dict[str, object]:
        """For the operator's log: the last exception's type and the places that it came through, and nothing that it
        said, which may quote private rows and stays in the folder."""
        text = (self.folder.path / LOG_FILE).read_text(encoding="utf-8", errors="replace")
        lines = text[text.rfind("Traceback (most recent call last)") :].split("\n")[1:]
        frames, error = [], None
        for line in lines:
            if found := _FRAME.fullmatch(line):
                if Path(found[1]).is_file():  # else it is no frame, but looks like one
                    frames.append(f"{'/'.join(Path(found[1]).parts[-3:])}:{found[2]} {found[3]}")
            elif not line.startswith(" "):
                kind = _EXCEPTION.match(line)  # what follows its name, and every line after, is its text
                error = kind[0] if kind else None
                break
        return {"error": error, "frames": frames}

    def close(self) -> None:
        """Kills what still runs and removes the folder."""
        self.kill()
        self._selector.close()
        self._listener.close()
        if self._connection is not None:
            self._connection.close()
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.stdin.close()
        self.folder.remove()

    def _receive(self) -> None:
        if self._connection is None:
            self._connection, _ = self._listener.accept()
            self._selector.unregister(self._listener)
            self._selector.register(self._connection, selectors.EVENT_READ)
            return
        try:
            received = self._connection.recv(_CHUNK)
        except ConnectionError:
            received = b""
        if received:
            self._pending += received
        else:
            self._ended = True


def _decoded(line: bytes) -> Message:
    try:
        return decode(line)
    except ValueError:
        raise BadMessage("not a message") from None


def _environment(folder: Path, threads: int) -> dict[str, str]:
    env = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    env |= {
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        # Threads that wait spin for some microseconds only (libgomp's own 300,000 turns take the core from the thread
        # that they wait for, wherever there is other work; without any turns a free machine is slower).
        "GOMP_SPINCOUNT": "1000",
    }
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    return tether.importable(env)
