"""`python -m worker.exporter`: waits for one line of JSON with `folder`, its current one, and makes the export that is
described there.

Exit status 0: made; 1: failed. Standard error goes to the folder's log, which never leaves it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from worker.trainer import landlock, sandbox


def main() -> int:
    """Makes one export, and ends."""
    sandbox.die_with_parent()
    sandbox.offline_environment()
    closed = landlock.close(Path.cwd(), landlock.Reach.from_env())
    # After the environment is set: these imports take seconds, and start threads.
    from worker.exporter.run import attempt
    from worker.trainer.control import Control
    from worker.trainer.messages import Notice
    from worker.trainer.spec import LOG_FILE

    line = sys.stdin.readline()
    if not line:
        return 0  # whoever started it is gone
    folder = Path(json.loads(line)["folder"])
    log = os.open(folder / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, sys.stderr.fileno())
    os.close(log)
    control = Control.connect(folder)
    if not sandbox.enter_sandbox():
        control.send(Notice("sandbox_unavailable"))
    if not closed:
        control.send(Notice("files_in_reach"))
    made = attempt(folder, control)
    control.close()
    return 0 if made else 1


if __name__ == "__main__":
    sys.exit(main())
