"""Budgets: a policy for single jobs, a lock after a restore, what reconciliations charged."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")

_TABLE = "privacy_budgets"


def upgrade() -> None:
    op.add_column(_TABLE, sa.Column("policy", JSON, nullable=True))
    op.add_column(_TABLE, sa.Column("foreign_head", JSON, nullable=True))
    op.add_column(_TABLE, sa.Column("rho_reconciled", sa.Double(), nullable=False, server_default="0"))


def downgrade() -> None:
    for name in ("rho_reconciled", "foreign_head", "policy"):
        op.drop_column(_TABLE, name)
