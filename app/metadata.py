"""Every table of every slice: importing this module makes `Base.metadata` whole, for migrations and tests."""

from __future__ import annotations

from sqlalchemy import MetaData

from app.auth import tables as auth
from app.budgets import tables as budgets
from app.db.base import Base
from app.events import tables as events
from app.exports import tables as exports
from app.files import tables as files
from app.jobs import tables as jobs
from app.models import tables as models
from app.uploads import tables as uploads

#: The modules that define rows, lowest slice first.
TABLES = (events, auth, budgets, files, uploads, models, exports, jobs)

metadata: MetaData = Base.metadata
