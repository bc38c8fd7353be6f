"""The HTTP application: built from settings, with everything that it holds in `app.state`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from app import api
from app.budgets import heads
from app.db.session import Database
from app.http import problems
from app.http.middleware import RequestEnvelope
from app.models import service as models
from app.queue import Queue
from app.secret_key import load_secret_key
from app.settings import Settings
from app.signing import load_report_keys
from app.storage import open_storage


def create_app(settings: Settings) -> FastAPI:
    """The application on a database that is migrated and set up (see `app.db.migrate`, `app.bootstrap`).

    `app.state` holds settings, database, storage, queue, secret_key and report_keys.
    """
    app = FastAPI(
        title="privtune",
        version="0.1.0",
        description="Fine-tune pretrained models on sensitive data under differential privacy.",
        lifespan=_lifespan,
        redoc_url=None,
    )
    app.state.settings = settings
    app.state.database = Database(settings.database)
    app.state.secret_key = load_secret_key(settings)
    app.state.report_keys = load_report_keys(settings, app.state.secret_key)
    app.state.storage = open_storage(settings.storage)
    heads.watch(app.state.database, app.state.storage)
    app.state.queue = Queue(settings.broker)
    problems.install(app)
    app.add_middleware(RequestEnvelope, streamed=api.STREAMED)
    api.mount(app)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    models.bases(app.state.settings)  # new ones are hashed in the background from here on
    yield
    app.state.queue.close()
    app.state.database.dispose()
