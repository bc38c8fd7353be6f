"""Settings from the environment. Each is documented in the README's table; a contract test holds the two together."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Read once at start and handed down; nothing else reads the environment."""

    model_config = SettingsConfigDict(env_prefix="PRIVTUNE_", extra="ignore", populate_by_name=True)

    data_dir: Path = Field(Path("privtune-data"), description="Folder of everything that the embedded service keeps.")
    database_url: str | None = Field(
        None,
        validation_alias=AliasChoices("DATABASE_URL", "database_url"),
        description="SQLAlchemy URL; unset: SQLite in the data folder. PostgreSQL: `postgresql+psycopg://…`.",
    )
    redis_url: str | None = Field(
        None,
        validation_alias=AliasChoices("REDIS_URL", "redis_url"),
        description="Broker; unset: a Valkey of our own on a Unix socket in the data folder.",
    )
    storage_url: str | None = Field(
        None,
        validation_alias=AliasChoices("STORAGE_URL", "storage_url"),
        description="Object storage, such as `s3://bucket/prefix`; unset: files in the data folder.",
    )
    api_key: SecretStr | None = Field(
        None, description="The first admin key; unset: the first start makes one and writes it to `api_key`."
    )
    secret_key: SecretStr | None = Field(
        None,
        description="Wraps job keys in the database: 32 bytes in hexadecimal, the same for API and workers; "
        "unset: made once and kept in the data folder's `secret_key`.",
    )
    signing_key: SecretStr | None = Field(
        None,
        description="Signs privacy reports: an Ed25519 seed, 32 bytes in hexadecimal, the same for API and workers; "
        "unset: derived from the secret key.",
    )

    default_epsilon: float = Field(3.0, gt=0, description="Target ε of a job that names none.")
    default_delta: float = Field(1e-6, gt=0, lt=1, description="Target δ of a job that names none.")
    budget_epsilon: float = Field(10.0, gt=0, description="ε limit of the budget made with a project.")
    budget_delta: float = Field(1e-6, gt=0, lt=1, description="δ of the budget made with a project.")

    max_upload_bytes: int = Field(4 * 2**30, gt=0, description="Largest file that an upload may bring.")
    upload_seconds: float = Field(
        24 * 3600, gt=0, description="An upload in parts that is not completed for so long has expired."
    )
    max_pending_uploads: int = Field(100, ge=1, description="Uploads in parts that one project may have begun at once.")
    max_job_seconds: float = Field(
        24 * 3600, gt=0, description="A job that trains longer in one attempt fails, and is charged in full."
    )
    max_attempts: int = Field(3, ge=1, description="Claims of one job before it fails.")
    lease_seconds: float = Field(30.0, gt=0, description="A worker that is silent for longer has lost its job.")
    heartbeat_seconds: float = Field(
        1.0, gt=0, description="How often a worker renews its lease and looks for a cancel."
    )
    sweep_seconds: float = Field(5.0, gt=0, description="How often expired leases and lost hints are looked for.")
    checkpoint_seconds: float = Field(60.0, ge=0, description="How often a running job keeps a checkpoint.")

    models_dir: Path | None = Field(
        None,
        description="A folder of Hugging Face models that jobs may start from, one folder each; the same for API and "
        "workers. Only safetensors are read.",
    )

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="`auto`, `cpu` or `cuda`.")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="What training steps compute in: `float32`, `bfloat16` or `float16`; "
        "16 bits are fast on a GPU, and noise covers their rounding.",
    )
    threads: int = Field(0, ge=0, description="CPU threads of a trainer; 0: torch's choice.")
    ranks: int = Field(
        0, ge=0, le=64, description="Processes that train a job together; 0: one for each GPU, one on a CPU."
    )
    max_physical_batch_tokens: int = Field(
        0,
        ge=0,
        description="Tokens that one forward pass takes (memory, not privacy); 0: what a dry run on synthetic rows and "
        "the free memory allow, at most 4096 on a CPU and 32768 on a GPU.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Lowest level that is logged.")

    @property
    def database(self) -> str:
        """The database's URL, embedded or not."""
        return self.database_url or f"sqlite:///{self.data_dir.resolve() / 'privtune.db'}"

    @property
    def broker_socket(self) -> Path:
        """The embedded Valkey's Unix socket."""
        return self.data_dir.resolve() / "valkey" / "valkey.sock"

    @property
    def broker(self) -> str:
        """The broker's URL, embedded or not."""
        return self.redis_url or f"redis+socket://{self.broker_socket}"

    @property
    def storage(self) -> str:
        """The object store's URL, embedded or not."""
        return self.storage_url or (self.data_dir.resolve() / "storage").as_uri()
