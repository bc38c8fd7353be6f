"""Jobs: when what their attempts left in the store was gone."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("erased_at", sa.Double(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "erased_at")
