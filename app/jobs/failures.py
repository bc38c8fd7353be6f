"""What a job can fail with: fixed codes, and the words that its user reads. Never a text from the run."""

from __future__ import annotations

#: The trainer's own codes are in `worker.trainer.messages.FAILURES`, which the service may not import; a contract test
#: holds the two together.
FAILURES: dict[str, str] = {
    "out_of_memory": "The training process ran out of memory.",
    "missing_gradient_norm": "A trainable parameter has no per-record gradient norm; no step was made.",
    "data_mismatch": "The rows do not match what the job was planned for.",
    "plan_mismatch": "The job's phases are not those of its privacy plan; no step was made.",
    "resume_mismatch": "The checkpoint was made under another plan or other data.",
    "base_model_invalid": "The base model cannot be loaded.",
    "nothing_to_train": "The adaptation leaves no parameter to train; no step was made.",
    "export_check_failed": "The exported model did not load or did not answer as the trained one.",
    "ranks_disagree": "The training processes came to different weights.",
    "trainer_error": "The training process failed.",
    "worker_lost": "The worker stopped answering, more often than this server allows.",
    "time_limit": "The job took longer than this server allows.",
    "storage_error": "The job's files could not be read or written.",
    "budget_reconciled": "The job was charged in full when its privacy budget was reconciled after a restore.",
    "job_key_unavailable": "The job's secret key cannot be opened; no step was made.",
}


def failure(code: str) -> dict[str, str | None]:
    """The wire's error of a failed job. An unknown code is told as `trainer_error`: nothing unlisted leaves."""
    known = code if code in FAILURES else "trainer_error"
    return {"code": known, "message": FAILURES[known], "param": None}
