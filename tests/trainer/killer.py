"""A fork server that kills its jobs: `python -m tests.trainer.killer`, one JSON line in and one line out for each.

In: {"folder", "key", "kill_after": global steps, or null}. Out: the child's exit status (-9: it was killed). The
parent never computes with torch, so that forking is safe; the kill comes between two steps, from the child to itself.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from worker.trainer import loop
from worker.trainer.control import Control
from worker.trainer.dp.step import PrivateStep
from worker.trainer.run import attempt


def _child(order: dict[str, Any]) -> int:
    made = 0
    after = order["kill_after"]

    class Killing(PrivateStep):
        def run(self, step: int, micro_batches: Any) -> Any:
            nonlocal made
            if made == after:
                os.kill(os.getpid(), signal.SIGKILL)
            made += 1
            return super().run(step, micro_batches)

    loop.PrivateStep = Killing  # type: ignore[misc]
    return 0 if attempt(Path(order["folder"]), bytes.fromhex(order["key"]), Control(None)) else 1


for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os._exit(_child(json.loads(line)))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
