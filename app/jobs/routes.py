"""/v1/fine_tuning/jobs."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from fastapi.responses import StreamingResponse

from app.errors import BudgetExceeded, InvalidRequest
from app.events import repository as event_rows
from app.events.schemas import render as render_event
from app.events.stream import stream
from app.events.tables import JobEvent
from app.http.deps import DatabaseDep, QueueDep, Reader, Reading, SecretKeyDep, SettingsDep, Submitter, Writing
from app.http.pagination import Page, list_response, paginate
from app.http.problems import answered
from app.jobs import answers, checkpoints, estimates, repository, service, submission
from app.jobs.schemas import CreateJob
from app.jobs.tables import Job
from app.models import service as models

router = APIRouter(prefix="/fine_tuning/jobs", tags=["fine-tuning"])

IdempotencyKey = Annotated[
    str | None, Header(alias="Idempotency-Key", min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$")
]


@router.post("", **answered(answers.JobOut))
def create_job(
    body: CreateJob,
    caller: Submitter,
    database: DatabaseDep,
    settings: SettingsDep,
    secret: SecretKeyDep,
    queue: QueueDep,
    idempotency_key: IdempotencyKey = None,
) -> dict[str, Any]:
    """Plans a job, reserves its whole cost, and queues it."""
    job = submission.submit(database, settings, secret, queue, caller, body, idempotency_key)
    with database.reading() as session:
        return service.render(session, [service.get(session, caller.project_id, job.id)])[0]


@router.post("/estimate", **answered(answers.EstimateOut))
def estimate_job(body: CreateJob, caller: Submitter, database: DatabaseDep, settings: SettingsDep) -> dict[str, Any]:
    """The plan of the same body, with nothing stored; or why there is none, and the nearest that there is.

    Its refusals tell of the file's columns what a submit tells: it needs the same scope.
    """
    try:
        planned = submission.estimate(database, settings, caller, body)
    except BudgetExceeded as error:
        return estimates.render_refusal(error)
    with database.reading() as session:
        return estimates.render(session, caller.project_id, planned)


@router.get("", **answered(answers.JobList))
def list_jobs(request: Request, caller: Reader, session: Reading, page: Page) -> dict[str, Any]:
    """The project's jobs, newest first; `metadata[key]=value` filters."""
    statement = repository.with_metadata(session, repository.readable(caller.project_id), _metadata_filter(request))
    rows, has_more = paginate(session, statement, Job, page)
    return list_response(service.render(session, rows), has_more)


@router.get("/{job_id}", **answered(answers.JobOut))
def retrieve_job(job_id: str, caller: Reader, session: Reading) -> dict[str, Any]:
    """Status, progress, ε spent so far."""
    return service.render(session, [service.get(session, caller.project_id, job_id)])[0]


@router.post("/{job_id}/cancel", **answered(answers.JobOut))
def cancel_job(job_id: str, caller: Submitter, session: Writing) -> dict[str, Any]:
    """At once where the job waits; within a step where it runs."""
    return service.render(session, [service.cancel(session, caller, job_id)])[0]


@router.post("/{job_id}/pause", **answered(answers.JobOut))
def pause_job(job_id: str, caller: Submitter, session: Reading) -> dict[str, Any]:
    """Not there yet."""
    service.get(session, caller.project_id, job_id)
    raise InvalidRequest("not_supported", "Jobs cannot be paused yet.")


@router.post("/{job_id}/resume", **answered(answers.JobOut))
def resume_job(job_id: str, caller: Submitter, session: Reading) -> dict[str, Any]:
    """Not there yet."""
    service.get(session, caller.project_id, job_id)
    raise InvalidRequest("not_supported", "Jobs cannot be paused and resumed yet.")


@router.get("/{job_id}/events", **answered(answers.EventList, "text/event-stream"))
def list_events(
    job_id: str,
    request: Request,
    caller: Reader,
    session: Reading,
    database: DatabaseDep,
    page: Page,
    last_event_id: Annotated[str | None, Header(alias="Last-Event-ID", max_length=64)] = None,
) -> dict[str, Any] | StreamingResponse:
    """The job's history, newest first; with `Accept: text/event-stream` live, until the job has ended."""
    service.get(session, caller.project_id, job_id)
    if "text/event-stream" in request.headers.get("accept", ""):
        ended = partial(service.ended, project_id=caller.project_id, job_id=job_id)
        return StreamingResponse(
            stream(database, caller.project_id, job_id, last_event_id, ended),
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )
    rows, has_more = paginate(
        session, event_rows.readable(caller.project_id, job_id), JobEvent, page, key=JobEvent.sequence
    )
    return list_response([render_event(row) for row in rows], has_more)


@router.get("/{job_id}/checkpoints", **answered(answers.CheckpointList))
def list_checkpoints(job_id: str, caller: Reader, session: Reading, page: Page) -> dict[str, Any]:
    """What was published on the way, each a model that can be taken, and the finished model; the latest first."""
    job = service.get(session, caller.project_id, job_id)
    published = [checkpoints.render(job, model) for model in models.released_by(session, caller.project_id, job.id)]
    if page.order == "asc":
        published.reverse()
    start = 0
    if page.after is not None:
        ids = [checkpoint["id"] for checkpoint in published]
        if page.after not in ids:
            raise InvalidRequest("invalid_after", "`after` is not the id of an object in this list.", param="after")
        start = ids.index(page.after) + 1
    return list_response(published[start : start + page.limit], has_more=start + page.limit < len(published))


def _metadata_filter(request: Request) -> dict[str, str]:
    """`metadata[team]=x` as the client sends it: a literal query key."""
    pairs: dict[str, str] = {}
    for key, value in request.query_params.items():
        if key.startswith("metadata[") and key.endswith("]"):
            if "\0" in key + value:
                raise InvalidRequest("invalid_request", "This metadata cannot be looked for.", param="metadata")
            pairs[key.removeprefix("metadata[").removesuffix("]")] = value
    return pairs
