"""Uploads: what their parts were joined to, in place of the parts' order; a limit on refusals; Idempotency-Key."""

from __future__ import annotations

import hashlib

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("uploads", sa.Column("joined", sa.String(64), nullable=True))
    op.add_column("uploads", sa.Column("md5", sa.String(32), nullable=True))
    op.add_column("uploads", sa.Column("refusals", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("uploads", sa.Column("idempotency_key", sa.String(255), nullable=True))
    op.create_index("uq_uploads_idempotency", "uploads", ["project_id", "idempotency_key"], unique=True)
    op.create_index("ix_uploads_project", "uploads", ["project_id", "id"])
    _keep_orders()
    op.execute("DELETE FROM upload_parts WHERE upload_id IN (SELECT id FROM uploads WHERE erased_at IS NOT NULL)")
    op.drop_column("upload_parts", "position")


def _keep_orders() -> None:
    """Of completed uploads: the digest that `app.uploads.service` makes of their parts' ids."""
    chosen = sa.text("SELECT upload_id, id FROM upload_parts WHERE position IS NOT NULL ORDER BY upload_id, position")
    orders: dict[str, list[str]] = {}
    for upload_id, part_id in op.get_bind().execute(chosen):
        orders.setdefault(upload_id, []).append(part_id)
    for upload_id, part_ids in orders.items():
        digest = hashlib.sha256(",".join(part_ids).encode()).hexdigest()
        op.get_bind().execute(
            sa.text("UPDATE uploads SET joined = :digest WHERE id = :id"), {"digest": digest, "id": upload_id}
        )


def downgrade() -> None:
    op.add_column("upload_parts", sa.Column("position", sa.Integer(), nullable=True))
    op.drop_index("ix_uploads_project", "uploads")
    op.drop_index("uq_uploads_idempotency", "uploads")
    for name in ("idempotency_key", "refusals", "md5", "joined"):
        op.drop_column("uploads", name)
