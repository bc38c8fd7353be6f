"""What routes ask for: who calls, a unit of work, and the services' handles.

A unit of work ends before the answer leaves (`scope="function"`), so that nobody is told of what was not committed. It
depends on the caller, whose own look at the database is over by then: no request ever holds two connections.

What only hands something over is `async def`: it costs no thread.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.orm import Session

from app.auth import service as auth
from app.auth.service import Caller, Scope
from app.db.session import Database
from app.errors import PermissionDenied, Unauthorized
from app.queue import Queue
from app.settings import Settings
from app.signing import ReportKeys
from app.storage import Storage

_bearer = HTTPBearer(auto_error=False, description="An API key of the project.")


async def get_settings(request: Request) -> Settings:
    """The settings that the application was made with."""
    settings: Settings = request.app.state.settings
    return settings


async def get_database(request: Request) -> Database:
    """For streams, which open a session of their own now and then."""
    database: Database = request.app.state.database
    return database


async def get_storage(request: Request) -> Storage:
    """The object store."""
    storage: Storage = request.app.state.storage
    return storage


async def get_queue(request: Request) -> Queue:
    """The broker's producer."""
    queue: Queue = request.app.state.queue
    return queue


async def get_secret_key(request: Request) -> bytes:
    """32 bytes that wrap job keys."""
    secret_key: bytes = request.app.state.secret_key
    return secret_key


async def get_report_keys(request: Request) -> ReportKeys:
    """What privacy reports are signed with."""
    keys: ReportKeys = request.app.state.report_keys
    return keys


DatabaseDep = Annotated[Database, Depends(get_database)]
SettingsDep = Annotated[Settings, Depends(get_settings)]
StorageDep = Annotated[Storage, Depends(get_storage)]
QueueDep = Annotated[Queue, Depends(get_queue)]
SecretKeyDep = Annotated[bytes, Depends(get_secret_key)]
ReportKeysDep = Annotated[ReportKeys, Depends(get_report_keys)]


def authenticated(
    request: Request,
    database: DatabaseDep,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Caller:
    """The caller. Unauthorized without a good key."""
    if credentials is None:
        raise Unauthorized("missing_api_key", "Send an API key: `Authorization: Bearer <key>`.")
    with database.reading() as session:
        caller = auth.authenticate(session, credentials.credentials)
    request.state.caller = caller  # for the access log
    return caller


def _needs(scope: Scope) -> Callable[[Caller], Awaitable[Caller]]:
    async def check(caller: Annotated[Caller, Depends(authenticated)]) -> Caller:
        if not caller.may(scope):
            raise PermissionDenied("insufficient_scope", f"This needs a key with the scope `{scope}`.")
        return caller

    return check


Reader = Annotated[Caller, Depends(_needs("read"))]
Submitter = Annotated[Caller, Depends(_needs("submit"))]
Admin = Annotated[Caller, Depends(_needs("admin"))]


def _reading(database: DatabaseDep, _caller: Annotated[Caller, Depends(authenticated)]) -> Iterator[Session]:
    with database.reading() as session:
        yield session


def _writing(database: DatabaseDep, _caller: Annotated[Caller, Depends(authenticated)]) -> Iterator[Session]:
    with database.writing() as session:
        yield session


Reading = Annotated[Session, Depends(_reading, scope="function")]
"""A consistent view; what is written into it is lost."""
Writing = Annotated[Session, Depends(_writing, scope="function")]
"""A unit of work: committed before the answer is sent, rolled back when the route raises."""
