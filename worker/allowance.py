"""How far ahead of its last word a trainer may go: so far is written down first, in case that no other word comes.

Worker and trainer may die together, or the worker alone fall silent. The steps of some seconds are allowed at a time:
few writes while all goes well, few steps in doubt when it does not. Each part of the plan has a pace of its own: a step
of a head takes milliseconds, one of the body behind it minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from app.jobs.lifecycle import Claimed

#: So many seconds' steps at once, as fast as they were of late, but no more than so many times those before.
SECONDS = 5.0
_FEWEST, _GROWTH = 2, 8
#: Steps that a trainer still makes which is asked to stop, or loses its worker, while it waits: centring, and a step.
AT_HAND = 2


@dataclass(frozen=True, slots=True)
class Until:
    """Steps, counted over all parts. told: to the trainer. noted: in the database; so far it may come."""

    told: int
    noted: int


class Allowance:
    """Of one attempt."""

    def __init__(self, claimed: Claimed, clock: Callable[[], float] = time.monotonic) -> None:
        self._ends = [*accumulate(part.num_steps for part in claimed.plan.parts)]
        self._clock = clock
        self._told, self._ahead, self._end = -1, 0, 0
        self._last_step, self._last_time = 0, clock()

    def after(self, step: int) -> Until | None:
        """What to allow now that the trainer has come to `step`, within the part of its next step. None while half of
        what it was allowed is left."""
        end = next((end for end in self._ends if end > step), self._ends[-1])
        if end != self._end:
            self._ahead, self._end = 0, end
        if self._told >= end or step + self._ahead // 2 < self._told:
            return None
        now = self._clock()
        pace = (step - self._last_step) / max(now - self._last_time, 1e-3)
        most = _GROWTH * self._ahead if self._ahead else _FEWEST
        self._ahead = max(_FEWEST, min(int(pace * SECONDS), most))
        self._last_step, self._last_time = step, now
        self._told = min(step + self._ahead, end)
        return Until(self._told, min(self._told + AT_HAND, self._ends[-1]))
