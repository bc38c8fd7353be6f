"""The privacy plan: one frozen value that couples what is sampled, clipped and noised to what is accounted.

It is computed once, stored with the job and executed verbatim by the trainer. The accountant's DpEvent is derived
from it (`app.privacy.dp_events`), so accounting and execution cannot drift apart. Runtime options (device, physical
batch, precision) are another value and never change privacy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Mechanism = Literal["dp_sgd", "none"]
Dataset = Literal["training", "validation"]
Clipping = Literal["flat", "automatic", "per_layer", "adaptive", "none"]

#: What one noised vector of a step can hold.
Coordinate = Literal["gradient", "loss", "quantile"]

#: The only neighbouring relation of version 1: a unit's records are replaced by nothing; the number of units is
#: public and fixed (dp-accounting's REPLACE_SPECIAL).
ZERO_OUT = "zero_out"


@dataclass(frozen=True, slots=True)
class PrivacyUnit:
    """Whose presence is protected: each record (`column is None`), or all records that share a column's value.

    max_records_per_unit: how many of a unit's records take part in one step, a choice among its own; None for records.
    It bounds work, not privacy: a unit's gradient is the mean over them, clipped once.
    """

    column: str | None = None
    max_records_per_unit: int | None = None

    def __post_init__(self) -> None:
        if (self.column is None) != (self.max_records_per_unit is None):
            raise ValueError("a unit by column has a bound on its records, a record has none")
        if self.max_records_per_unit is not None and self.max_records_per_unit < 1:
            raise ValueError("max_records_per_unit must be at least 1")


@dataclass(frozen=True, slots=True)
class LossSum:
    """The private loss curve: one more coordinate of a step's noised sum.

    A unit adds its mean loss, clipped to [0, bound], less bound / 2: within ±bound / 2, which is the sensitivity.
    share: of the step's privacy, see `SampledGaussian.noise_multipliers`.
    """

    bound: float
    share: float

    def __post_init__(self) -> None:
        _require_share(self.share)
        if not (self.bound > 0.0 and math.isfinite(self.bound)):
            raise ValueError("a loss is clipped to a positive, finite bound")


@dataclass(frozen=True, slots=True)
class QuantileSum:
    """Adaptive clipping (Andrew et al. 2021, Algorithm 1): the norm bound follows a quantile of the units' norms.

    A unit adds ½ where its norm is within the bound, -½ where it is not: the sensitivity is ½. After each step
    C ← C · exp(-learning_rate · (b - target_quantile)), with b the noised share of units within C.
    share: of the step's privacy, see `SampledGaussian.noise_multipliers`.
    """

    share: float
    target_quantile: float
    learning_rate: float

    def __post_init__(self) -> None:
        _require_share(self.share)
        if not (0.0 < self.target_quantile < 1.0 and 0.0 < self.learning_rate <= 1.0):
            raise ValueError("a quantile lies in (0, 1), its learning rate in (0, 1]")


def _require_share(share: float) -> None:
    if not 0.0 < share < 0.5:
        raise ValueError("what rides along takes a share of a step's privacy in (0, 0.5)")


@dataclass(frozen=True, slots=True)
class SampledGaussian:
    """`num_steps` Poisson-sampled, clipped and noised sums over the training units (Abadi et al. 2016).

    sample_rate: inclusion probability q of each unit, independently in each step.
    noise_multiplier: σ, standard deviation of the noise over the sensitivity of all that one step releases together.
    max_grad_norm: L2 bound C on a unit's gradient, with `adaptive` clipping the first step's. `automatic` clipping
    scales to C = 1, `per_layer` to C_l with √Σ C_l² = C.
    loss, quantile: what rides along with the gradient in the same noised vector.
    """

    name: str  # the phase, unique in the plan; names its stream of randomness too
    sample_rate: float
    num_steps: int
    noise_multiplier: float
    max_grad_norm: float
    clipping: Clipping
    dataset: Dataset = "training"
    kind: Literal["sampled_gaussian"] = "sampled_gaussian"
    loss: LossSum | None = None
    quantile: QuantileSum | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.sample_rate <= 1.0:
            raise ValueError("sample_rate must lie in (0, 1]")
        if self.num_steps < 1:
            raise ValueError("num_steps must be at least 1")
        if not (self.noise_multiplier >= 0.0 and math.isfinite(self.noise_multiplier)):
            raise ValueError("noise_multiplier must be finite and not negative")
        if not self.max_grad_norm > 0.0:
            raise ValueError("max_grad_norm must be positive")
        if (self.quantile is not None) != (self.clipping == "adaptive"):
            raise ValueError("adaptive clipping needs its quantile, no other has one")

    @property
    def noise_multipliers(self) -> dict[Coordinate, float]:
        """Standard deviation of each coordinate's noise over that coordinate's own sensitivity: σ / √share.

        The shares add up to 1, the gradient has what the others leave. So Σ (Δ_j / s_j)² = σ⁻²: together they are one
        Gaussian mechanism of noise multiplier σ, which is what is accounted.
        """
        shares: dict[Coordinate, float] = {"gradient": 1.0}
        for name, rider in (("loss", self.loss), ("quantile", self.quantile)):
            if rider is not None:
                shares[name] = rider.share  # type: ignore[index]
                shares["gradient"] -= rider.share
        return {name: self.noise_multiplier / math.sqrt(share) for name, share in shares.items()}


@dataclass(frozen=True, slots=True)
class GaussianRelease:
    """One noised sum over every unit of a dataset: a private mean, confusion counts.

    sensitivity: L2 norm that one unit can contribute. The noise's standard deviation is noise_multiplier · sensitivity.
    """

    name: str
    noise_multiplier: float
    sensitivity: float
    dataset: Dataset = "training"
    kind: Literal["gaussian_release"] = "gaussian_release"

    def __post_init__(self) -> None:
        if not (self.noise_multiplier >= 0.0 and math.isfinite(self.noise_multiplier)):
            raise ValueError("noise_multiplier must be finite and not negative")
        if not self.sensitivity > 0.0:
            raise ValueError("sensitivity must be positive")

    @property
    def num_steps(self) -> int:
        """A release is executed once."""
        return 1


Part = SampledGaussian | GaussianRelease


@dataclass(frozen=True, slots=True)
class PrivacyPlan:
    """All that a job does to private rows, in the order of execution.

    num_units: units that training samples from (after the split), public by declaration.
    epsilon: certified ε at target_delta of all parts that touch the training file's budget; None without a mechanism.
    accountant: what certified it, with its version and discretization.
    """

    mechanism: Mechanism
    num_units: int
    parts: tuple[Part, ...]
    target_epsilon: float | None = None
    target_delta: float | None = None
    epsilon: float | None = None
    accountant: str | None = None
    privacy_unit: PrivacyUnit = field(default_factory=PrivacyUnit)
    num_validation_units: int = 0
    neighboring_relation: str = ZERO_OUT

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if len(set(names)) != len(names):
            raise ValueError("part names must be unique: each names a stream of randomness")
        if self.num_units < 1:
            raise ValueError("num_units must be at least 1")
        if self.neighboring_relation != ZERO_OUT:
            raise ValueError(f"neighboring_relation must be {ZERO_OUT}")
        if self.mechanism == "dp_sgd":
            if any(part.noise_multiplier <= 0.0 for part in self.parts):
                raise ValueError("every part of a private plan must be noised")
            if any(isinstance(part, SampledGaussian) and part.clipping == "none" for part in self.parts):
                raise ValueError("every gradient of a private plan must be clipped")
            if self.target_epsilon is None or self.target_delta is None:
                raise ValueError("a private plan states its target ε and δ")

    def part(self, name: str) -> Part:
        """The part of that name; KeyError without one."""
        for part in self.parts:
            if part.name == name:
                return part
        raise KeyError(name)

    def expected_batch_size(self, part: SampledGaussian) -> float:
        """q · N: the only divisor of a noised sum; never the size of the batch that was drawn."""
        return part.sample_rate * self.num_units

    def executed(self, steps: Mapping[str, int]) -> PrivacyPlan:
        """The plan cut to the steps that were executed, for charging; parts without a step are left out.

        Raises ValueError where more steps are claimed than were planned.
        """
        kept: list[Part] = []
        for part in self.parts:
            count = steps.get(part.name, 0)
            if not 0 <= count <= part.num_steps:
                raise ValueError("executed steps must lie between 0 and the planned ones")
            if count == part.num_steps:
                kept.append(part)
            elif count and isinstance(part, SampledGaussian):
                kept.append(dataclasses.replace(part, num_steps=count))
        return dataclasses.replace(self, parts=tuple(kept))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` gives the same value back."""
        fields = dataclasses.asdict(self)
        if self.privacy_unit.column is None:
            # Stated only where it says something: plans from before there were units by column keep their digest.
            del fields["privacy_unit"]["max_records_per_unit"]
        for part in fields["parts"]:
            for rider in ("loss", "quantile"):
                if part.get(rider, ...) is None:
                    del part[rider]  # so do plans from before something could ride along
        return fields

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PrivacyPlan:
        """Raises KeyError, TypeError or ValueError on anything that `to_dict` did not write."""
        fields = dict(data)
        fields["parts"] = tuple(_part_from_dict(part) for part in data["parts"])
        fields["privacy_unit"] = PrivacyUnit(**data["privacy_unit"])
        return cls(**fields)

    def digest(self) -> str:
        """SHA-256 of the canonical JSON: binds job keys, checkpoints and ledger entries to this plan."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()


def _part_from_dict(data: Mapping[str, Any]) -> Part:
    kinds: dict[str, type[SampledGaussian] | type[GaussianRelease]] = {
        "sampled_gaussian": SampledGaussian,
        "gaussian_release": GaussianRelease,
    }
    fields = dict(data)
    for name, cls in (("loss", LossSum), ("quantile", QuantileSum)):
        if fields.get(name) is not None:
            fields[name] = cls(**fields[name])
    return kinds[data["kind"]](**fields)
