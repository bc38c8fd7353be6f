"""The queue: a Celery producer whose messages carry nothing but an id.

A message is a hint that work may be waiting in the database: losing, repeating or reordering one does no harm, a sweep
repeats it. So a broker that does not answer is logged and never an error of the request.
"""

from __future__ import annotations

from typing import Final, Literal

import structlog
from celery import Celery

log = structlog.get_logger(__name__)

TaskName = Literal["train_job", "run_export", "process_file"]

TRAIN_JOB: Final = "train_job"
RUN_EXPORT: Final = "run_export"
PROCESS_FILE: Final = "process_file"
TRAINING_QUEUE: Final = "training"
FILES_QUEUE: Final = "files"

#: A half-open connection may not hold a request or a worker for longer (kombu's own default is for ever).
SOCKET_SECONDS = 5.0


def make_celery(broker_url: str) -> Celery:
    """The Celery application of producers and workers alike: JSON, early acknowledgement, no results, no countdowns."""
    celery = Celery("privtune", broker=broker_url)
    celery.conf.update(
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        task_acks_late=False,
        task_routes={
            TRAIN_JOB: {"queue": TRAINING_QUEUE},
            RUN_EXPORT: {"queue": TRAINING_QUEUE},
            PROCESS_FILE: {"queue": FILES_QUEUE},
        },
        task_default_queue=FILES_QUEUE,
        worker_prefetch_multiplier=1,
        worker_send_task_events=False,
        worker_enable_remote_control=False,
        broker_connection_retry_on_startup=True,
        broker_transport_options={
            "socket_timeout": SOCKET_SECONDS,
            "socket_connect_timeout": SOCKET_SECONDS,
            "socket_keepalive": True,
            "health_check_interval": 25,
        },
    )
    return celery


class Queue:
    """Publishes hints. One per process; safe to use from several threads."""

    def __init__(self, broker_url: str) -> None:
        self._celery = make_celery(broker_url)
        # One try: kombu's own retries would keep a request waiting for seconds while the broker is down.
        self._celery.conf.broker_transport_options |= {"max_retries": 0, "interval_start": 0, "interval_max": 0}

    def hint_job(self, job_id: str) -> None:
        """A job may be ready to be claimed."""
        self._hint(TRAIN_JOB, job_id)

    def hint_export(self, export_id: str) -> None:
        """An export may be ready to be claimed."""
        self._hint(RUN_EXPORT, export_id)

    def hint_file(self, file_id: str) -> None:
        """A file may be waiting to be processed."""
        self._hint(PROCESS_FILE, file_id)

    def ping(self) -> None:
        """Returns if the broker answers; raises whatever its client raises if not."""
        with self._celery.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=SOCKET_SECONDS)

    def close(self) -> None:
        """Closes the connections."""
        self._celery.close()

    def _hint(self, task: TaskName, identifier: str) -> None:
        try:
            self._celery.send_task(task, args=[identifier], retry=False, ignore_result=True)
        except Exception as error:
            # Whatever the broker's client raises: the row stands in the database, and the sweep hints again.
            log.warning("hint_lost", task=task, id=identifier, error=type(error).__name__)
