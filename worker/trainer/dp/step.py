"""One optimizer step of DP-SGD (Abadi et al. 2016), the only way from private rows to weights.

For a drawn Poisson batch: sum clipped unit gradients over micro-batches and ranks, add noise once, divide by the plan's
expected batch size (a constant, never the size of what was drawn) and hand the result to a torch optimizer. An empty
batch takes the same path: it is noised, steps and counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from app.privacy.plan import PrivacyPlan, SampledGaussian
from worker.trainer.dp.clipping import clipping_sensitivity
from worker.trainer.dp.engine import Batch, GradientEngine
from worker.trainer.dp.randomness import NOISE, JobRandomness
from worker.trainer.dp.reduce import rank_and_world_size, sum_over_ranks_

#: Rounding may carry what is summed past the clipping bound: noise covers C · (1 + tolerance), as test S checks.
#: Leaving one unit out can change the order in which the others' products are added up, and so the last bits of all
#: other gradients, each in a direction of its own: up to one percent of a gradient where products round to 16 bits, a
#: millionth in float32.
TOLERANCE = 1e-3
TOLERANCE_HALF = 1e-2


def rounding_tolerance(num_units: float, *, half_precision: bool) -> float:
    """Relative to the sensitivity, for a sum over `num_units` bounded gradients."""
    return TOLERANCE_HALF * max(1.0, num_units) ** 0.5 if half_precision else TOLERANCE


def noise_std(plan: PrivacyPlan, part: SampledGaussian, *, half_precision: bool = False) -> float:
    """Standard deviation of the noise on the sum; zero only where the plan's mechanism is none."""
    if plan.mechanism == "none":
        return 0.0
    if part.noise_multiplier <= 0.0:
        raise ValueError("a private step needs noise")
    tolerance = rounding_tolerance(plan.expected_batch_size(part), half_precision=half_precision)
    return part.noise_multiplier * clipping_sensitivity(part.clipping, part.max_grad_norm) * (1.0 + tolerance)


class PrivateStep:
    """Executes the steps of one part of a plan. Holds no randomness of its own: a replayed step is the same step."""

    def __init__(
        self,
        engine: GradientEngine,
        optimizer: Optimizer,
        parameters: Mapping[str, nn.Parameter],
        *,
        plan: PrivacyPlan,
        part: SampledGaussian,
        randomness: JobRandomness,
        half_precision: bool = False,
    ) -> None:
        if part not in plan.parts:
            raise ValueError("the part must belong to the plan")
        self._engine = engine
        self._optimizer = optimizer
        self._parameters = dict(parameters)
        self._part = part
        self._randomness = randomness
        self._std = noise_std(plan, part, half_precision=half_precision)
        self._divisor = plan.expected_batch_size(part)

    def run(self, step: int, micro_batches: Iterable[tuple[Batch, Tensor]]) -> None:
        """Executes step `step` (from 0) on this rank's micro-batches, each (batch, unit_index) of whole units."""
        if not 0 <= step < self._part.num_steps:
            raise ValueError("the plan has no such step")
        self._engine.reset()  # nothing of an abandoned step may enter this one
        # A replayed step drops what it dropped before; ranks draw apart, so that no two records share a mask.
        rank, _ = rank_and_world_size()
        torch.manual_seed(self._randomness.torch_seed(self._part.name, step, f"rank {rank}"))
        for batch, unit_index in micro_batches:
            self._engine.accumulate(batch, unit_index)
        for name, gradient in self._noised(step).items():
            self._parameters[name].grad = gradient.to(self._parameters[name].dtype)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _noised(self, step: int) -> dict[str, Tensor]:
        sums = self._engine.take()
        if set(sums) != set(self._parameters):
            raise ValueError("the engine and the step train different parameters")
        sum_over_ranks_(sums.values())
        with torch.no_grad():
            for name, total in sums.items():
                if self._std > 0.0:
                    self._randomness.add_noise_(
                        total, self._std, phase=self._part.name, step=step, stream=NOISE, name=name
                    )
                total.div_(self._divisor)
        return sums
