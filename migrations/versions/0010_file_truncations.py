"""Files: which attempt's figures of what a job cut are told to the owner."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "file_truncations",
        sa.Column("file_id", sa.String(40), sa.ForeignKey("files.id"), primary_key=True),
        sa.Column("job_id", sa.String(40), primary_key=True),
        sa.Column("dataset", sa.String(16), primary_key=True),
        sa.Column("fence", sa.Integer(), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("file_truncations")
