"""A job's history as server-sent events: what happened so far, then what happens, until the job has ended."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import anyio
import anyio.to_thread
from sqlalchemy.orm import Session

from app.db.session import Database
from app.events import repository
from app.events.schemas import render

#: Seconds between two looks at the database.
POLL_SECONDS = 0.5
#: Seconds of silence after which a comment line keeps proxies from closing the connection.
PING_SECONDS = 15.0

_BATCH = 200


async def stream(
    database: Database,
    project_id: str,
    job_id: str,
    last_event_id: str | None,
    until_done: Callable[[Session], bool],
) -> AsyncIterator[bytes]:
    """Events after `last_event_id` (all, where it is none or not this job's), then `data: [DONE]`.

    until_done: whether the job has ended; asked before the events are read, in the same transaction or an earlier one,
    so that the last event, which is committed together with the end, is always among them.
    """

    def start() -> int:
        with database.reading() as session:
            found = repository.find_sequence(session, project_id, job_id, last_event_id) if last_event_id else None
            return found or 0

    def look(sequence: int) -> tuple[bool, int, list[bytes]]:
        with database.reading() as session:
            done = until_done(session)
            events = repository.after(session, project_id, job_id, sequence, _BATCH)
        last = events[-1].sequence if events else sequence
        return done and len(events) < _BATCH, last, [_encode(render(e).model_dump_json(), e.id) for e in events]

    sequence = await anyio.to_thread.run_sync(start)
    silent = 0.0
    yield b": connected\n"
    while True:
        done, sequence, encoded = await anyio.to_thread.run_sync(look, sequence)
        if encoded:
            silent = 0.0
            yield b"".join(encoded)
        if done:
            yield b"data: [DONE]\n\n"
            return
        if len(encoded) < _BATCH:
            await anyio.sleep(POLL_SECONDS)
            silent += POLL_SECONDS
            if silent >= PING_SECONDS:
                silent = 0.0
                yield b": ping\n"


def _encode(data: str, event_id: str) -> bytes:
    # The id last: a connection may break between the two, and who notes ids line by line would go on behind an event
    # that he never saw. A comment is followed by no blank line, for which the openai client would read an empty event.
    return f"data: {data}\nid: {event_id}\n\n".encode()
