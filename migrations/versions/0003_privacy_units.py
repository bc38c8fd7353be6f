"""Files: privacy units by column, how many records they have, and whether a job ever held the file."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    op.add_column("files", sa.Column("unit_column", sa.String(length=64), nullable=True))
    op.add_column("files", sa.Column("num_units", sa.BigInteger(), nullable=True))
    op.add_column("files", sa.Column("records_per_unit", JSON, nullable=True))
    op.add_column("files", sa.Column("used_at", sa.Double(), nullable=True))
    # Until now each record was a unit of its own, and any file may have been used.
    op.execute("UPDATE files SET num_units = num_rows, used_at = created_at")


def downgrade() -> None:
    for name in ("used_at", "records_per_unit", "num_units", "unit_column"):
        op.drop_column("files", name)
