"""`python -m worker.trainer JOB_FOLDER`, with the job's key in hexadecimal as the first line of standard input.

Without a folder it is a warm spare: it imports everything, prints nothing, and waits for one line of JSON with `folder`
and `key`; its standard error then goes to the folder's trainer.log. Exit status 0: finished or stopped; 1: failed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from worker.trainer import sandbox


def main(arguments: list[str]) -> int:
    """Runs one job, and ends."""
    sandbox.die_with_parent()
    sandbox.offline_environment()
    if len(arguments) > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        print("usage: python -m worker.trainer [JOB_FOLDER], one process a job", file=sys.stderr)  # noqa: T201
        return 2
    # After the environment is set, and before a spare waits: these imports take seconds.
    from worker.trainer.control import Control
    from worker.trainer.messages import Notice
    from worker.trainer.run import attempt
    from worker.trainer.spec import LOG_FILE

    line = sys.stdin.readline()
    if arguments:
        folder, key = Path(arguments[0]), bytes.fromhex(line)
    elif not line:
        return 0  # a spare that was never needed
    else:
        order = json.loads(line)
        folder, key = Path(order["folder"]), bytes.fromhex(order["key"])
        log = os.open(folder / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, sys.stderr.fileno())
        os.close(log)
    control = Control.connect(folder)
    if not sandbox.enter_sandbox():
        control.send(Notice("sandbox_unavailable"))
    finished = attempt(folder, key, control)
    control.close()
    return 0 if finished else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
