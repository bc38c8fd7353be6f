"""Files: which lists of classes were declared for them, since a refusal of one tells of the rows."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    op.add_column("files", sa.Column("label_lists", JSON, nullable=True))


def downgrade() -> None:
    op.drop_column("files", "label_lists")
