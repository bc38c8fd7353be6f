"""Jobs: whether an attempt was given the rows, since one that is lost before costs nothing."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("rows_withheld", sa.Integer(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "rows_withheld")
