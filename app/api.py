"""Which slice answers where."""

from __future__ import annotations

import importlib

from fastapi import APIRouter, FastAPI

from app.http import health
from app.http.problems import RESPONSES

#: The routers under /v1, in the order of the documentation.
# While slices are being laid, one that is not there yet is left out.
SLICES = ("files", "jobs", "models", "budgets")

#: Paths that take bodies of any size, up to limits of their own.
STREAMED = frozenset({"/v1/files"})


def mount(app: FastAPI) -> None:
    """Adds every route to the application."""
    v1 = APIRouter(prefix="/v1", responses=RESPONSES)
    for name in SLICES:
        try:
            module = importlib.import_module(f"app.{name}.routes")
        except ImportError:
            continue
        v1.include_router(module.router)
    app.include_router(v1)
    app.include_router(health.router)
