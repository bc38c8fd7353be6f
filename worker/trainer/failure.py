"""How the trainer says that it cannot go on: a fixed code, and a text that stays in the job folder's log."""

from __future__ import annotations

from worker.trainer.messages import FAILURES


class TrainerFailure(Exception):
    """A failure whose code the user sees. The text goes to standard error only: it may describe private rows."""

    def __init__(self, code: str, text: str = "") -> None:
        assert code in FAILURES
        super().__init__(text or FAILURES[code])
        self.code = code


class StopRequested(Exception):
    """The supervisor asked to stop: nothing more is executed. Raised between steps, never inside one."""
