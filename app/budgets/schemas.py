"""What requests about budgets hold, and, for the API's documentation, what `views` answers."""

from __future__ import annotations

from typing import Any, Literal

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


class FixedInAdvance(BaseModel):
    """What all that was charged would come to as one plan: a smaller ε, valid only had it been fixed beforehand."""

    epsilon: float
    accountant: str


class EpsilonAt(BaseModel):
    """The same two at another δ."""

    delta: float
    epsilon_spent: float
    if_fixed_in_advance: float | None


class StillFit(BaseModel):
    """How many more jobs like the last one fit."""

    like_job: str
    rho_each: float
    jobs: int


class Head(BaseModel):
    """The ledger's latest entry."""

    sequence: int
    hash: str


class StoreHead(BaseModel):
    """The latest entry that was ever published; null where it cannot be read. rho: charged and reserved until there."""

    sequence: int | None
    hash: str | None
    rho: float | None


class LockOut(BaseModel):
    """Why nothing starts on the budget: its database is older than what was published from it. rho_missing: what a
    reconciliation charges at least; null: not known, say it yourself."""

    code: Literal["budget_locked"]
    detected_at: int
    store_head: StoreHead
    rho_missing: float | None


class BudgetOut(BaseModel):
    """A limit over all jobs on the files that are attached to it.

    Every ε is at the budget's δ. They do not add up: what adds up is ρ, of Rényi order rdp_order (rho_spent +
    rho_reserved + rho_remaining = rho_capacity). epsilon_remaining: the largest ε that one more plan could have, as a
    rule more than the limit less what is spent. epsilon_spent: what was charged comes to, however it was chosen.
    fraction_used: of rho_capacity. lock: null but for a budget that is `locked`.
    """

    id: str
    object: Literal["privacy_budget"]
    name: str
    is_default: bool
    status: Literal["open", "closed", "locked"]
    created_at: int
    epsilon_limit: float
    delta: float
    neighboring_relation: Literal["zero_out"]
    privacy_unit: Unit
    policy: Policy | None
    epsilon_spent: float
    epsilon_spent_accountant: str
    epsilon_reserved: float
    epsilon_remaining: float
    if_fixed_in_advance: FixedInAdvance | None
    epsilon_at: list[EpsilonAt]
    rdp_order: int
    rho_capacity: float
    rho_spent: float
    rho_reserved: float
    rho_remaining: float
    fraction_used: float
    still_fit: StillFit | None
    ledger_head: Head
    lock: LockOut | None


class BudgetList(BaseModel):
    """A page of budgets."""

    object: Literal["list"]
    data: list[BudgetOut]
    has_more: bool


class EntryOut(BaseModel):
    """An entry of the ledger, with all that its hash covers. actor: the id of a key, or `worker`. dp_event: what was
    reserved, charged or published. created_at: Unix seconds, with their fraction, as they were hashed."""

    id: str
    object: Literal["privacy_budget.entry"]
    budget_id: str
    sequence: int
    kind: str
    job_id: str | None
    actor: str
    rho: float
    dp_event: dict[str, Any] | None
    details: dict[str, Any]
    created_at: float
    previous_hash: str
    hash: str


class EntryList(BaseModel):
    """A page of the ledger."""

    object: Literal["list"]
    data: list[EntryOut]
    has_more: bool


class PointOut(BaseModel):
    """ε by the filter right after an entry: of what was charged, and what reservations added. id: of the entry."""

    id: str
    object: Literal["privacy_budget.point"]
    created_at: float
    kind: str
    job_id: str | None
    epsilon_charged: float
    epsilon_reserved: float
    rho_charged: float
    rho_reserved: float


class LimitOut(BaseModel):
    """From when on which limit held."""

    created_at: float
    epsilon_limit: float


class Timeline(BaseModel):
    """Points to plot, oldest first, and the limits."""

    object: Literal["list"]
    data: list[PointOut]
    has_more: bool
    delta: float
    limits: list[LimitOut]


class AuditOut(BaseModel):
    """intact: every hash of the chain is right; else first_broken_sequence is the first that is not. sums_agree: the
    entries' sums are those that admission counts."""

    object: Literal["privacy_budget.audit"]
    budget_id: str
    intact: bool
    entries: int
    first_broken_sequence: int | None
    sums_agree: bool
    ledger_head: Head
