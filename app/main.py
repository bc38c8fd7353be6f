"""The HTTP application: built from settings, with everything that it holds in `app.state`."""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from app import api
from app.db.session import Database
from app.http import problems
from app.http.middleware import RequestEnvelope
from app.secret_key import load_secret_key
from app.settings import Settings


def create_app(settings: Settings) -> FastAPI:
    """The application on a database that is migrated and set up (see `app.db.migrate`, `app.bootstrap`).

    `app.state` holds settings, database, storage, queue and secret_key.
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
    try:
        app.state.storage = importlib.import_module("app.storage").open_storage(settings.storage)
        app.state.queue = importlib.import_module("app.queue").Queue(settings.broker)
    except (ImportError, AttributeError):
        app.state.storage = app.state.queue = None
    problems.install(app)
    app.add_middleware(RequestEnvelope)
    api.mount(app)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    app.state.database.dispose()
