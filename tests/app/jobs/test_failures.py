"""The codes that a failed job may tell are those that trainer and supervisor have, in the same words."""

from __future__ import annotations

from app.jobs.failures import FAILURES, failure
from worker.trainer.messages import FAILURES as TRAINER


def test_every_failure_of_the_trainer_is_told_in_its_words():
    assert {code: FAILURES.get(code) for code in TRAINER} == TRAINER


def test_what_is_not_listed_is_not_told():
    assert failure("KeyError: 'Jane Doe'") == {**failure("trainer_error")}
