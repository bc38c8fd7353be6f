"""Models: a job may publish several, those of its checkpoints beside the finished one."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_FINISHED = sa.text("step_number IS NULL")


def upgrade() -> None:
    with op.batch_alter_table("models") as table:
        table.add_column(sa.Column("step_number", sa.Integer(), nullable=True))
        table.drop_constraint("uq_models_job_id", type_="unique")
        table.create_unique_constraint("uq_models_job_step", ["job_id", "step_number"])
    op.create_index(
        "ix_models_finished",
        "models",
        ["job_id"],
        unique=True,
        sqlite_where=_FINISHED,
        postgresql_where=_FINISHED,
    )


def downgrade() -> None:
    op.execute("DELETE FROM models WHERE step_number IS NOT NULL")
    op.drop_index("ix_models_finished", table_name="models")
    with op.batch_alter_table("models") as table:
        table.drop_constraint("uq_models_job_step", type_="unique")
        table.create_unique_constraint("uq_models_job_id", ["job_id"])
        table.drop_column("step_number")
