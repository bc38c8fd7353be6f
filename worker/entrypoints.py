"""What the queues call. A message carries one id and is acknowledged before it is worked on: the database decides."""

from __future__ import annotations

from celery import Celery

from app.queue import PROCESS_FILE, RUN_EXPORT, TRAIN_JOB
from worker import chores, exports, supervisor
from worker.spares import Spares
from worker.workplace import Workplace


def register_training(celery: Celery, workplace: Workplace, spares: Spares) -> None:
    """Work of the training queue."""

    def train_job(job_id: str) -> None:
        supervisor.run_job(workplace, spares, job_id)

    celery.task(train_job, name=TRAIN_JOB)

    def run_export(export_id: str) -> None:
        exports.run_export(workplace, export_id)

    celery.task(run_export, name=RUN_EXPORT)


def register_files(celery: Celery, workplace: Workplace) -> None:
    """Work of the files queue."""

    def process_file(file_id: str) -> None:
        chores.process_file(workplace, file_id)

    celery.task(process_file, name=PROCESS_FILE)
