"""Models: what a later job that starts from one has to know, and which jobs need one."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    op.add_column("models", sa.Column("base_facts", JSON, nullable=True))
    op.create_table(
        "model_uses",
        sa.Column("model_id", sa.String(length=96), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name=op.f("fk_model_uses_model_id_models")),
        sa.PrimaryKeyConstraint("model_id", "job_id", name=op.f("pk_model_uses")),
    )
    op.create_index(op.f("ix_model_uses_job_id"), "model_uses", ["job_id"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_model_uses_job_id"), table_name="model_uses")
    op.drop_table("model_uses")
    op.drop_column("models", "base_facts")
