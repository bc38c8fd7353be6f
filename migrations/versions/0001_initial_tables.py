"""Initial tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    op.create_table(
        "projects",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_projects")),
        sa.UniqueConstraint("name", name=op.f("uq_projects_name")),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("prefix", sa.String(length=16), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("scopes", JSON, nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("revoked_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_api_keys_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("digest", name=op.f("uq_api_keys_digest")),
    )
    op.create_index(op.f("ix_api_keys_project_id"), "api_keys", ["project_id"], unique=False)
    op.create_table(
        "job_events",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("level", sa.String(length=8), nullable=False),
        sa.Column("type", sa.String(length=16), nullable=False),
        sa.Column("code", sa.String(length=64), nullable=False),
        sa.Column("message", sa.String(length=512), nullable=False),
        sa.Column("data", JSON, nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_job_events_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job_events")),
    )
    op.create_index("ix_job_events_job_id_sequence", "job_events", ["job_id", "sequence"], unique=True)
    op.create_table(
        "models",
        sa.Column("id", sa.String(length=96), nullable=False),
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("base", sa.String(length=200), nullable=False),
        sa.Column("storage_prefix", sa.String(length=255), nullable=False),
        sa.Column("files", JSON, nullable=False),
        sa.Column("archives", JSON, nullable=False),
        sa.Column("metrics", JSON, nullable=False),
        sa.Column("privacy_report", JSON, nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("deleted_at", sa.Double(), nullable=True),
        sa.Column("erased_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_models_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_models")),
        sa.UniqueConstraint("job_id", name=op.f("uq_models_job_id")),
    )
    op.create_index("ix_models_project", "models", ["project_id", "created_at"], unique=False)
    op.create_table(
        "privacy_budgets",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("is_default", sa.Boolean(), nullable=False),
        sa.Column("epsilon_limit", sa.Double(), nullable=False),
        sa.Column("delta", sa.Double(), nullable=False),
        sa.Column("neighboring_relation", sa.String(length=32), nullable=False),
        sa.Column("privacy_unit", JSON, nullable=False),
        sa.Column("rdp_order", sa.Integer(), nullable=False),
        sa.Column("rho_capacity", sa.Double(), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("next_sequence", sa.Integer(), nullable=False),
        sa.Column("head_hash", sa.String(length=64), nullable=False),
        sa.CheckConstraint("status IN ('open', 'closed')", name=op.f("ck_privacy_budgets_status")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_privacy_budgets_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_privacy_budgets")),
    )
    op.create_index(
        "ix_privacy_budgets_default",
        "privacy_budgets",
        ["project_id"],
        unique=True,
        sqlite_where=sa.text("is_default"),
        postgresql_where=sa.text("is_default"),
    )
    op.create_index(op.f("ix_privacy_budgets_project_id"), "privacy_budgets", ["project_id"], unique=False)
    op.create_table(
        "files",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("budget_id", sa.String(length=40), nullable=True),
        sa.Column("filename", sa.String(length=255), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("purpose", sa.String(length=32), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("error", JSON, nullable=True),
        sa.Column("public", sa.Boolean(), nullable=False),
        sa.Column("format", sa.String(length=16), nullable=True),
        sa.Column("num_rows", sa.BigInteger(), nullable=True),
        sa.Column("rows_digest", sa.String(length=64), nullable=True),
        sa.Column("columns", JSON, nullable=True),
        sa.Column("source_key", sa.String(length=255), nullable=False),
        sa.Column("rows_key", sa.String(length=255), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("claimed_until", sa.Double(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.Column("deleted_at", sa.Double(), nullable=True),
        sa.Column("erased_at", sa.Double(), nullable=True),
        sa.Column("idempotency_key", sa.String(length=255), nullable=True),
        sa.CheckConstraint("status IN ('uploaded', 'processed', 'error')", name=op.f("ck_files_status")),
        sa.CheckConstraint("public = (budget_id IS NULL)", name=op.f("ck_files_budget")),
        sa.ForeignKeyConstraint(["budget_id"], ["privacy_budgets.id"], name=op.f("fk_files_budget_id_privacy_budgets")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_files_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_files")),
        sa.UniqueConstraint("project_id", "idempotency_key", name="uq_files_idempotency"),
    )
    op.create_index("ix_files_digest", "files", ["project_id", "sha256"], unique=False)
    op.create_index("ix_files_project", "files", ["project_id", "id"], unique=False)
    op.create_index("ix_files_status", "files", ["status"], unique=False)
    op.create_table(
        "ledger_entries",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("budget_id", sa.String(length=40), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=True),
        sa.Column("actor", sa.String(length=64), nullable=False),
        sa.Column("rho", sa.Double(), nullable=False),
        sa.Column("dp_event", JSON, nullable=True),
        sa.Column("details", JSON, nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("previous_hash", sa.String(length=64), nullable=False),
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(
            ["budget_id"], ["privacy_budgets.id"], name=op.f("fk_ledger_entries_budget_id_privacy_budgets")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ledger_entries")),
        sa.UniqueConstraint("budget_id", "sequence", name="uq_ledger_entries_budget_sequence"),
    )
    op.create_table(
        "reservations",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("budget_id", sa.String(length=40), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("rho", sa.Double(), nullable=False),
        sa.Column("rho_charged", sa.Double(), nullable=False),
        sa.Column("dp_event", JSON, nullable=False),
        sa.Column("charged_event", JSON, nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("settled_at", sa.Double(), nullable=True),
        sa.CheckConstraint("state IN ('reserved', 'settled')", name=op.f("ck_reservations_state")),
        sa.CheckConstraint("rho >= 0 AND rho_charged >= 0 AND rho_charged <= rho", name=op.f("ck_reservations_rho")),
        sa.ForeignKeyConstraint(
            ["budget_id"], ["privacy_budgets.id"], name=op.f("fk_reservations_budget_id_privacy_budgets")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_reservations")),
        sa.UniqueConstraint("budget_id", "job_id", name="uq_reservations_budget_job"),
    )
    op.create_index(op.f("ix_reservations_job_id"), "reservations", ["job_id"], unique=False)
    op.create_table(
        "file_uses",
        sa.Column("file_id", sa.String(length=40), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.ForeignKeyConstraint(["file_id"], ["files.id"], name=op.f("fk_file_uses_file_id_files")),
        sa.PrimaryKeyConstraint("file_id", "job_id", name=op.f("pk_file_uses")),
    )
    op.create_index(op.f("ix_file_uses_job_id"), "file_uses", ["job_id"], unique=False)
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("key_id", sa.String(length=40), nullable=False),
        sa.Column("status", sa.String(length=32), nullable=False),
        sa.Column("model", sa.String(length=200), nullable=False),
        sa.Column("suffix", sa.String(length=64), nullable=True),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("metadata", JSON, nullable=False),
        sa.Column("training_file_id", sa.String(length=40), nullable=False),
        sa.Column("validation_file_id", sa.String(length=40), nullable=True),
        sa.Column("request", JSON, nullable=False),
        sa.Column("request_digest", sa.String(length=64), nullable=False),
        sa.Column("idempotency_key", sa.String(length=255), nullable=True),
        sa.Column("resolved", JSON, nullable=True),
        sa.Column("plan", JSON, nullable=True),
        sa.Column("plan_digest", sa.String(length=64), nullable=True),
        sa.Column("charges", JSON, nullable=False),
        sa.Column("hyperparameters", JSON, nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("lease_expires_at", sa.Double(), nullable=True),
        sa.Column("worker", sa.String(length=200), nullable=True),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("interrupted", sa.Boolean(), nullable=False),
        sa.Column("progress", JSON, nullable=True),
        sa.Column("checkpoint", JSON, nullable=True),
        sa.Column("runtime", JSON, nullable=True),
        sa.Column("executed", JSON, nullable=True),
        sa.Column("error", JSON, nullable=True),
        sa.Column("fine_tuned_model", sa.String(length=128), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("queued_at", sa.Double(), nullable=True),
        sa.Column("hinted_at", sa.Double(), nullable=True),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.CheckConstraint(
            "status IN ('validating_files', 'queued', 'running', 'succeeded', 'failed', 'cancelled')",
            name=op.f("ck_jobs_status"),
        ),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_jobs_project_id_projects")),
        sa.ForeignKeyConstraint(["training_file_id"], ["files.id"], name=op.f("fk_jobs_training_file_id_files")),
        sa.ForeignKeyConstraint(["validation_file_id"], ["files.id"], name=op.f("fk_jobs_validation_file_id_files")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
        sa.UniqueConstraint("project_id", "idempotency_key", name="uq_jobs_idempotency"),
    )
    op.create_index("ix_jobs_project", "jobs", ["project_id", "id"], unique=False)
    op.create_index("ix_jobs_queue", "jobs", ["status", "queued_at", "id"], unique=False)
    op.create_table(
        "job_keys",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("wrapped", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_keys_job_id_jobs")),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_job_keys")),
    )


def downgrade() -> None:
    op.drop_table("job_keys")
    op.drop_index("ix_jobs_queue", table_name="jobs")
    op.drop_index("ix_jobs_project", table_name="jobs")
    op.drop_table("jobs")
    op.drop_index(op.f("ix_file_uses_job_id"), table_name="file_uses")
    op.drop_table("file_uses")
    op.drop_index(op.f("ix_reservations_job_id"), table_name="reservations")
    op.drop_table("reservations")
    op.drop_table("ledger_entries")
    op.drop_index("ix_files_status", table_name="files")
    op.drop_index("ix_files_project", table_name="files")
    op.drop_index("ix_files_digest", table_name="files")
    op.drop_table("files")
    op.drop_index(op.f("ix_privacy_budgets_project_id"), table_name="privacy_budgets")
    op.drop_index(
        "ix_privacy_budgets_default",
        table_name="privacy_budgets",
        sqlite_where=sa.text("is_default"),
        postgresql_where=sa.text("is_default"),
    )
    op.drop_table("privacy_budgets")
    op.drop_index("ix_models_project", table_name="models")
    op.drop_table("models")
    op.drop_index("ix_job_events_job_id_sequence", table_name="job_events")
    op.drop_table("job_events")
    op.drop_index(op.f("ix_api_keys_project_id"), table_name="api_keys")
    op.drop_table("api_keys")
    op.drop_table("projects")
