"""The trainer's end of the job folder's Unix socket: messages out, Stop in. Without a socket it runs on its own."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

from worker.trainer.failure import StopRequested
from worker.trainer.messages import Message, Progress, Stop, decode, encode
from worker.trainer.spec import SOCKET_FILE

#: Seconds between two progress messages, at least.
PROGRESS_INTERVAL = 0.2


class Control:
    """Sends messages in the order of the calls; a thread listens. A lost supervisor counts as Stop."""

    def __init__(self, connection: socket.socket | None) -> None:
        self._connection = connection
        self._stop = threading.Event()
        self._last_progress = float("-inf")
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
        return cls(connection)

    @property
    def attached(self) -> bool:
        """Whether a supervisor listens (and commits or deletes checkpoints)."""
        return self._connection is not None

    def send(self, message: Message) -> None:
        """Sends one message; a lost connection sets the stop flag instead of raising."""
        if self._connection is None:
            return
        try:
            self._connection.sendall(encode(message))
        except OSError:
            self._stop.set()

    def progress(self, message: Progress, *, last: bool = False) -> None:
        """Sends progress, at most every PROGRESS_INTERVAL seconds, and always the last."""
        now = time.monotonic()
        if last or now - self._last_progress >= PROGRESS_INTERVAL:
            self._last_progress = now
            self.send(message)

    @property
    def stop_requested(self) -> bool:
        """Whether Stop came in."""
        return self._stop.is_set()

    def check(self) -> None:
        """Raises StopRequested once Stop came in. Called between steps."""
        if self._stop.is_set():
            raise StopRequested

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
                    if isinstance(decode(line), Stop):
                        break
            except (OSError, ValueError):
                pass
        self._stop.set()
