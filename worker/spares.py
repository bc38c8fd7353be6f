"""One trainer in reserve: it has imported torch, trained a made-up job and waits for the claimed one."""

from __future__ import annotations

import structlog

from app.settings import Settings
from worker import job_folder, reach
from worker.trainer_process import TrainerProcess

log = structlog.get_logger(__name__)


class Spares:
    """Keeps one spare trainer. Used by the main thread only: trainers end with the thread that started them."""

    def __init__(self, settings: Settings) -> None:
        """Removes what killed workers left behind, and starts the first spare."""
        self._root = job_folder.folders_root(settings)
        self._settings = settings
        self._spare: TrainerProcess | None = None
        removed = job_folder.remove_abandoned(self._root)
        if removed:
            log.info("abandoned_job_folders_removed", count=removed)
        self.prepare()

    def take(self) -> TrainerProcess:
        """The spare, or a fresh trainer where it died; the caller closes it. Raises OSError."""
        spare, self._spare = self._spare, None
        if spare is not None and spare.waits():
            return spare
        if spare is not None:
            log.warning("spare_trainer_not_usable", status=spare.process.returncode)
            spare.close()
        return self._start()

    def prepare(self) -> None:
        """Starts a spare where there is none. A failure is logged: `take` tries again."""
        if self._spare is None:
            try:
                self._spare = self._start()
            except OSError:
                log.exception("spare_trainer_not_started")

    def close(self) -> None:
        """Ends the spare."""
        if self._spare is not None:
            self._spare.close()
            self._spare = None

    def _start(self) -> TrainerProcess:
        return TrainerProcess(self._root, reach=reach.of_children(self._settings), threads=self._settings.threads)
