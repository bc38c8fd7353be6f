"""The trainer's end of the job folder's Unix socket: messages out; Rows, Allowed and Stop in. Without, it runs
alone."""

from __future__ import annotations

import math
import socket
import threading
import time
from pathlib import Path

from worker.trainer.dp.reduce import from_first_rank
from worker.trainer.failure import StopRequested
from worker.trainer.messages import Allowed, Failed, Message, Progress, Ready, Rows, Stop, decode, encode
from worker.trainer.spec import SOCKET_FILE

#: Seconds between two progress messages of a phase, at least.
PROGRESS_INTERVAL = 0.2


class Control:
    """Sends messages in the order of the calls; a thread listens. A lost supervisor counts as Stop.

    supervised: whether the other end gives the rows and says how far the job may go; else they are there, and it may go
    to its end.
    """

    def __init__(self, connection: socket.socket | None, *, supervised: bool = False) -> None:
        self._connection = connection
        self._stop = threading.Event()
        self._allowed: float = 0 if supervised else math.inf
        self._has_rows = not supervised
        self._answered = threading.Condition()
        self._sending = threading.Lock()
        self.failed = False  # whether Failed was sent
        self._last_progress, self._last_phase = float("-inf"), ""
        if connection is not None:
            threading.Thread(target=self._listen, args=(connection,), name="control", daemon=True).start()

    @classmethod
    def connect(cls, folder: Path) -> Control:
        """Connects to `control.sock` of a job folder, if there is one."""
        path = folder / SOCKET_FILE
        if not path.exists():
            return cls(None)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(str(path))
        return cls(connection, supervised=True)

    @property
    def attached(self) -> bool:
        """Whether a supervisor listens (and commits or deletes checkpoints)."""
        return self._connection is not None

    def send(self, message: Message) -> None:
        """Sends one message, from any thread; a lost connection sets the stop flag instead of raising. Failed is the
        last word: what comes after it is not sent."""
        with self._sending:
            if self.failed:
                return
            self.failed = isinstance(message, Failed)
            if self._connection is None:
                return
            try:
                self._connection.sendall(encode(message))
            except OSError:
                self._stopped()

    def progress(self, message: Progress, *, last: bool = False) -> None:
        """Sends progress, at most every PROGRESS_INTERVAL seconds; always the first of a phase, and the last."""
        now = time.monotonic()
        if last or message.phase != self._last_phase or now - self._last_progress >= PROGRESS_INTERVAL:
            self._last_progress, self._last_phase = now, message.phase
            self.send(message)

    def await_rows(self) -> None:
        """Once all is done that needs none: returns when they are in the folder. A collective; as `check`, raises
        StopRequested."""
        if not (self._has_rows or self._stop.is_set()):
            self.send(Ready())
            with self._answered:
                self._answered.wait_for(lambda: self._has_rows or self._stop.is_set())
        self.check()

    def await_allowed(self, standing: Progress) -> None:
        """Before the step after `standing` is executed: returns once the supervisor has it in the database that it may
        have been, or asked to stop, as it would in the middle of a step."""
        if standing.step < self._allowed:
            return
        self.send(standing)
        with self._answered:
            self._answered.wait_for(lambda: standing.step < self._allowed or self._stop.is_set())

    @property
    def stop_requested(self) -> bool:
        """Whether Stop came in, to this rank."""
        return self._stop.is_set()

    def check(self) -> None:
        """Raises StopRequested on every rank once Stop came in to the first: a collective, called between steps."""
        (stop,) = from_first_rank(self._stop.is_set())
        if stop:
            raise StopRequested

    def wait_for_end(self) -> None:
        """Until the other side ends the conversation, or asks to stop."""
        if self._connection is not None:
            self._stop.wait()

    def close(self) -> None:
        """Ends the conversation; what was sent before still arrives."""
        if self._connection is not None:
            try:
                self._connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the other end was faster
            self._connection.close()

    def _listen(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as lines:
            try:
                for line in lines:
                    message = decode(line)
                    if isinstance(message, Stop):
                        break
                    with self._answered:
                        if isinstance(message, Allowed):
                            self._allowed = max(self._allowed, message.step)
                        self._has_rows |= isinstance(message, Rows)
                        self._answered.notify_all()
            except (OSError, ValueError):
                pass
        self._stopped()

    def _stopped(self) -> None:
        self._stop.set()
        with self._answered:
            self._answered.notify_all()
