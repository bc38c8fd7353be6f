"""Runs jobs: a supervisor (Celery, no torch) and, a fresh child process a job, the trainer."""
