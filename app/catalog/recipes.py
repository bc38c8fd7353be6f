"""What a job optimises, phase by phase: the values between a request and its privacy plan, and the measured defaults.

A `Recipe` fixes everything but the noise multiplier; `Recipe.parts` gives the plan's parts for one, so that calibration
can search it. The defaults are measured on small datasets; they read only what is public (task, units, target ε).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.catalog.adaptations import Adaptation, adaptation_from_dict, adaptation_to_dict
from app.privacy.plan import Clipping, GaussianRelease, Part, SampledGaussian

#: Names of the plan's parts.
CENTRING, HEAD_PHASE, MAIN_PHASE, EVALUATION = "centring", "head", "main", "evaluation"


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of DP-SGD with one optimizer.

    name: also the name of the plan's part that it executes, step for step.
    learning_rate: of the adapted body (or of the head where only the head trains); head_learning_rate: of a new head.
    averaging: decay of the exponential moving average whose weights the phase ends with; None: the last weights.
    noise_ratio: this phase's noise multiplier over the main one.
    """

    name: str
    adaptation: Adaptation
    sample_rate: float
    num_steps: int
    learning_rate: float
    head_learning_rate: float
    averaging: float | None = None
    noise_ratio: float = 1.0
    weight_decay: float = 0.0
    optimizer: str = "adamw"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` gives the same value back."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**fields, "adaptation": adaptation_to_dict(self.adaptation)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Phase:
        """Raises KeyError, TypeError or ValueError on anything that `to_dict` did not write."""
        return cls(**{**data, "adaptation": adaptation_from_dict(data["adaptation"])})


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything about a job's training but the noise.

    centring_noise_multiplier: of the private mean of the frozen features; None: features are not centred.
    evaluation: the noised release of the metrics, calibrated to a share of its own; None: nothing private is released.
    """

    phases: tuple[Phase, ...]
    clipping: Clipping
    max_grad_norm: float
    centring_noise_multiplier: float | None = None
    evaluation: GaussianRelease | None = None

    def parts(self, noise_multiplier: float) -> tuple[Part, ...]:
        """The plan's parts, in the order of execution, at this main noise multiplier (0: a job that is not private)."""
        private = noise_multiplier > 0.0
        parts: list[Part] = []
        if self.centring_noise_multiplier is not None:
            parts.append(GaussianRelease(CENTRING, self.centring_noise_multiplier if private else 0.0, sensitivity=1.0))
        parts += [
            SampledGaussian(
                name=phase.name,
                sample_rate=phase.sample_rate,
                num_steps=phase.num_steps,
                noise_multiplier=noise_multiplier * phase.noise_ratio,
                max_grad_norm=self.max_grad_norm,
                clipping=self.clipping if private else "none",
            )
            for phase in self.phases
        ]
        if self.evaluation is not None:
            parts.append(self.evaluation)
        return tuple(parts)
