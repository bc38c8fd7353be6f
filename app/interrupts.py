"""SIGINT and SIGTERM of a long-running command: heard from first to last, whatever runs when they come."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

Handler = Callable[[int, FrameType | None], Any]


class Interrupts:
    """Notes the signals inside its block, also where they were ignored before (as in a shell's background).

    At first one raises KeyboardInterrupt too. That alone does not do: Python drops what is raised in `__del__` or in a
    weak reference's callback, and one between a thread's start and the `try` after it leaves the thread behind.
    For the main thread.
    """

    def __init__(self) -> None:
        self.noted = False
        self._raises = True
        self._handler: Handler | None = None

    def __enter__(self) -> Interrupts:
        self._before = {number: signal.signal(number, self._hear) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def only_note(self) -> None:
        """From here on they raise nothing. Raises KeyboardInterrupt where one came before."""
        self._raises = False
        self.check()

    def check(self) -> None:
        """Raises KeyboardInterrupt where one came."""
        if self.noted:
            raise KeyboardInterrupt

    def pass_to(self, handler: Handler) -> None:
        """From here on `handler` gets them, as signal handlers do. Raises KeyboardInterrupt where one came before."""
        self._handler = handler
        self.check()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.noted = True
        if self._handler is not None:
            self._handler(number, frame)
        elif self._raises:
            raise KeyboardInterrupt
