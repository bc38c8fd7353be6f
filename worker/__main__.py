"""`python -m worker [--queues training,files]`: one process for each queue, kept running until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from app import logging, tether
from app.processes import Keeper, Service
from app.queue import FILES_QUEUE, TRAINING_QUEUE
from app.settings import Settings

QUEUES = (TRAINING_QUEUE, FILES_QUEUE)


def main() -> int:
    """Runs until it is asked to end; 2 for arguments that make no sense."""
    tether.become_unreadable()
    parser = argparse.ArgumentParser(prog="privtune worker", description="Runs jobs and reads files.")
    parser.add_argument("--queues", default=",".join(QUEUES), help=f"which of {', '.join(QUEUES)}, separated by commas")
    queues = parser.parse_args().queues.split(",")
    if not set(queues) <= set(QUEUES):
        parser.error(f"queues are {', '.join(QUEUES)}")
    logging.configure(Settings().log_level)
    env = tether.importable(os.environ)
    services = [Service(queue, tether.python("-m", "worker.main", queue), env) for queue in queues]
    keeper = Keeper(services, stop_together=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: keeper.stop())
    keeper.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
