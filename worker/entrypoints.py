"""What the queues call. A message carries one id and is acknowledged before it is worked on: the database decides."""

from __future__ import annotations

from celery import Celery

from app.queue import PROCESS_FILE, TRAIN_JOB
from worker import chores, supervisor
from worker.spares import Spares
from worker.workplace import Workplace


def register_training(celery: Celery, workplace: Workplace, spares: Spares) -> None:
    """Work of the training queue."""

    @celery.task(name=TRAIN_JOB)
    def train_job(job_id: str) -> None:
        supervisor.run_job(workplace, spares, job_id)


def register_files(celery: Celery, workplace: Workplace) -> None:
    """Work of the files queue."""

    @celery.task(name=PROCESS_FILE)
    def process_file(file_id: str) -> None:
        chores.process_file(workplace, file_id)
