"""Files: how far their reader is."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("files", sa.Column("bytes_read", sa.BigInteger(), nullable=False, server_default="0"))
    op.execute("UPDATE files SET bytes_read = bytes WHERE status = 'processed'")


def downgrade() -> None:
    op.drop_column("files", "bytes_read")
