"""What requests about budgets hold."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Policy(_Body):
    """What a single job on the budget may promise at most; null: anything that fits."""

    max_target_epsilon: float | None = Field(None, gt=0, allow_inf_nan=False)
    max_target_delta: float | None = Field(None, gt=0, lt=1, allow_inf_nan=False)


class Unit(_Body):
    """Who is protected by every job: all records with one value in that column. Null: each file's own unit."""

    column: str | None = Field(None, min_length=1, max_length=200)


class CreateBudget(_Body):
    """A limit over all jobs on the files that will be attached to it."""

    name: str = Field(min_length=1, max_length=200)
    epsilon_limit: float = Field(gt=0, allow_inf_nan=False)
    delta: float = Field(gt=0, lt=1, allow_inf_nan=False)
    neighboring_relation: Literal["zero_out"] = "zero_out"
    privacy_unit: Unit = Unit()
    policy: Policy | None = None


class UpdateBudget(_Body):
    """δ, order, relation and unit stay: what was admitted was admitted under them."""

    name: str | None = Field(None, min_length=1, max_length=200)
    epsilon_limit: float | None = Field(None, gt=0, allow_inf_nan=False)
    policy: Policy | None = None

    @model_validator(mode="after")
    def _something(self) -> UpdateBudget:
        if not self.model_fields_set:
            raise ValueError("must change the name, the limit or the policy")
        return self


class Reconcile(_Body):
    """rho: what to charge for what the database forgot; null: what the store's head counts beyond it."""

    rho: float | None = Field(None, ge=0, le=1024, allow_inf_nan=False)
    note: str | None = Field(None, min_length=1, max_length=500)
