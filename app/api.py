"""Which slice answers where."""

from __future__ import annotations

import re

from fastapi import APIRouter, FastAPI

from app.budgets import routes as budgets
from app.exports import routes as exports
from app.files import routes as files
from app.http import health
from app.http.problems import RESPONSES
from app.jobs import routes as jobs
from app.models import routes as models
from app.uploads import routes as uploads

#: The routers under /v1, in the order of the documentation; what lies below a model comes before the models' own, which
#: take whatever is left.
SLICES = (
    files.router,
    uploads.router,
    jobs.router,
    models.bases_in_folders,
    exports.router,
    models.router,
    budgets.router,
)

#: Paths that take bodies of any size, up to limits of their own.
STREAMED = re.compile(r"/v1/files|/v1/uploads/[^/]+/parts")


def mount(app: FastAPI) -> None:
    """Adds every route to the application."""
    v1 = APIRouter(prefix="/v1", responses=RESPONSES)
    for router in SLICES:
        v1.include_router(router)
    app.include_router(v1)
    app.include_router(health.router)
