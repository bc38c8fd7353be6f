"""`python -m worker.trainer JOB_FOLDER`, with the job's key in hexadecimal as the first line of standard input.

Without a folder it is a warm spare, in the folder that will be its job's: it imports everything, trains a made-up model
for a step, prints nothing, and waits for one line of JSON with `folder` and `key`; its standard error then goes to the
folder's trainer.log. Either reaches no other files than `landlock` says, and starts as many further ranks as the job's
runtime options say; `torchrun --nproc-per-node N -m worker.trainer JOB_FOLDER` brings them, all on one host, and the
key goes to torchrun's standard input. Exit status 0: finished or stopped; 1: failed.
"""

from __future__ import annotations

import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path

from worker.trainer import landlock, sandbox


def main(arguments: list[str]) -> int:
    """Runs one job, and ends."""
    sandbox.die_with_parent()
    sandbox.offline_environment()
    if len(arguments) > 1:
        print("usage: python -m worker.trainer [JOB_FOLDER]", file=sys.stderr)  # noqa: T201
        return 2
    folder, reach = Path(*arguments).resolve(), landlock.Reach.from_env()
    sandbox.wake_gpus()
    closed = landlock.close(folder, replace(reach, read=(*reach.read, *landlock.named_by(folder / "spec.json"))))
    # After the environment is set, and before a spare waits: these imports take seconds, and start threads.
    from worker.trainer import ranks, warm_up
    from worker.trainer.messages import Notice
    from worker.trainer.run import attempt
    from worker.trainer.spec import LOG_FILE

    if not arguments:
        warm_up.warm_up(ranks.order_waits)
    received = ranks.receive(arguments)
    if received is None:
        return 0
    order, channel = received
    if not arguments:
        log = os.open(order.folder / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, sys.stderr.fileno())
        os.close(log)
    try:
        met = ranks.Ranks.meet(order, channel)
    except (OSError, RuntimeError):
        traceback.print_exc(file=sys.stderr)
        return 1
    if not sandbox.enter_sandbox():
        met.control.send(Notice("sandbox_unavailable"))
    if not closed:
        met.control.send(Notice("files_in_reach"))
    if not attempt(order.folder, order.key, met.control):
        met.hear_the_others()
        return 1
    met.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
