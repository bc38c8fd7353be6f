"""`python -m worker.main QUEUE`: one Celery worker that reads one queue and works in its own main thread (solo pool).

Training takes one job at a time; files are processed one after another, and the sweep runs beside them. Nothing here
imports torch. SIGTERM ends it gracefully: a job that is training goes back to the queue.
"""

from __future__ import annotations

import contextlib
import sys
import warnings

from celery import Celery
from celery.platforms import SecurityWarning
from celery.signals import setup_logging, worker_shutting_down

from app import logging, tether
from app.queue import FILES_QUEUE, TRAINING_QUEUE, make_celery
from app.settings import Settings
from worker import entrypoints
from worker.chores import Sweeper
from worker.spares import Spares
from worker.workplace import Workplace


def main(queue: str) -> int:
    """Runs until SIGTERM; the worker's exit status."""
    tether.become_unreadable()
    settings = Settings()
    logging.configure(settings.log_level)
    workplace = Workplace.open(settings)
    celery = make_celery(settings.broker)
    celery.conf.update(
        # A hint that waits behind a long job should be another worker's.
        worker_disable_prefetch=True,
    )
    worker_shutting_down.connect(lambda **_: workplace.shutting_down.set(), weak=False)
    setup_logging.connect(lambda **_: None, weak=False)  # a receiver is all it takes: logging stays as it is
    # Its reason, messages that are pickled, does not hold here: only JSON is taken.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    with contextlib.ExitStack() as stack:
        stack.callback(workplace.close)
        if queue == TRAINING_QUEUE:
            spares = stack.enter_context(contextlib.closing(Spares(settings)))
            entrypoints.register_training(celery, workplace, spares)
        else:
            stack.enter_context(Sweeper(workplace))
            entrypoints.register_files(celery, workplace)
        return _run(celery, queue, workplace.name)


def _run(celery: Celery, queue: str, name: str) -> int:
    worker = celery.Worker(
        hostname=f"{queue}@{name}",
        queues=[queue],
        pool="solo",
        concurrency=1,
        loglevel=None,
        quiet=True,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
    )
    worker.start()
    return worker.exitcode or 0


if __name__ == "__main__":
    assert sys.argv[1:] in ([TRAINING_QUEUE], [FILES_QUEUE])
    sys.exit(main(sys.argv[1]))
