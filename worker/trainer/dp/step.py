"""One optimizer step of DP-SGD (Abadi et al. 2016), the only way from private rows to weights.

For a drawn Poisson batch: sum clipped unit gradients over micro-batches and ranks, add noise once, divide by the plan's
expected batch size (a constant, never the size of what was drawn) and hand the result to a torch optimizer. Clipped
losses, and adaptive clipping's count, are further coordinates of the same noised vector: the plan splits its noise
multiplier among them. An empty batch takes the same path: it is noised, steps and counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from app.privacy.plan import Coordinate, PrivacyPlan, SampledGaussian
from worker.trainer.dp.clipping import clipping_sensitivity
from worker.trainer.dp.engine import Batch, GradientEngine, UnitValues
from worker.trainer.dp.optimizers import AdamBC
from worker.trainer.dp.randomness import CLIP, LOSS, NOISE, JobRandomness
from worker.trainer.dp.reduce import rank_and_world_size, sum_over_ranks_
from worker.trainer.dp.scalars import StepRelease, adapted, centred_count, centred_losses, mean_loss

#: Rounding may carry what is summed past the clipping bound: noise covers C · (1 + tolerance), as test S checks.
#: Leaving one unit out can change the order in which the others' products are added up, and so the last bits of all
#: other gradients, each in a direction of its own: up to one percent of a gradient where products round to 16 bits, a
#: millionth in float32.
TOLERANCE = 1e-3
TOLERANCE_HALF = 1e-2


def rounding_tolerance(num_units: float, *, half_precision: bool) -> float:
    """Relative to the sensitivity, for a sum over `num_units` bounded gradients."""
    return TOLERANCE_HALF * max(1.0, num_units) ** 0.5 if half_precision else TOLERANCE


def noise_std(
    plan: PrivacyPlan,
    part: SampledGaussian,
    coordinate: Coordinate = "gradient",
    *,
    max_grad_norm: float | None = None,
    half_precision: bool = False,
) -> float:
    """Standard deviation of the noise on a sum; zero only where the plan's mechanism is none.

    max_grad_norm: of the step at hand, where clipping is adaptive; the plan's by default.
    """
    if plan.mechanism == "none":
        return 0.0
    if part.noise_multiplier <= 0.0:
        raise ValueError("a private step needs noise")
    tolerance = rounding_tolerance(plan.expected_batch_size(part), half_precision=half_precision)
    return part.noise_multipliers[coordinate] * _sensitivity(part, coordinate, max_grad_norm) * (1.0 + tolerance)


def _sensitivity(part: SampledGaussian, coordinate: Coordinate, max_grad_norm: float | None) -> float:
    if coordinate == "loss" and part.loss is not None:
        return part.loss.bound / 2.0
    if coordinate == "quantile":
        return 0.5
    return clipping_sensitivity(part.clipping, part.max_grad_norm if max_grad_norm is None else max_grad_norm)


class PrivateStep:
    """Executes the steps of one part of a plan. Holds no randomness of its own: a replayed step is the same step.

    max_grad_norm: C of the next step; with adaptive clipping it is state, which a resumed job sets from its checkpoint.
    """

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
        noise_std(plan, part)  # raises where a private step would have no noise
        self.max_grad_norm = part.max_grad_norm
        self._engine = engine
        self._optimizer = optimizer
        self._parameters = dict(parameters)
        self._plan = plan
        self._part = part
        self._randomness = randomness
        self._half_precision = half_precision
        self._divisor = plan.expected_batch_size(part)

    def run(self, step: int, micro_batches: Iterable[tuple[Batch, Tensor]]) -> StepRelease:
        """Executes step `step` (from 0) on this rank's micro-batches, each (batch, unit_index) of whole units."""
        if not 0 <= step < self._part.num_steps:
            raise ValueError("the plan has no such step")
        self._engine.reset()  # nothing of an abandoned step may enter this one
        self._engine.max_grad_norm = self.max_grad_norm
        # A replayed step drops what it dropped before; ranks draw apart, so that no two records share a mask.
        rank, _ = rank_and_world_size()
        torch.manual_seed(self._randomness.torch_seed(self._part.name, step, f"rank {rank}"))
        device = next(iter(self._parameters.values())).device
        scalars = {name: torch.zeros(1, dtype=torch.float64, device=device) for name in self._riders()}
        for batch, unit_index in micro_batches:
            values = self._engine.accumulate(batch, unit_index)
            for name, scalar in scalars.items():
                scalar += self._centred(name, values).sum()
        sums = self._engine.take()
        if set(sums) != set(self._parameters):
            raise ValueError("the engine and the step train different parameters")
        sum_over_ranks_([*sums.values(), *scalars.values()])
        std = self._std("gradient")
        for parameter, total in sums.items():
            self._add_noise_(total, std, step, NOISE, parameter, self._divisor)
            self._parameters[parameter].grad = total.to(self._parameters[parameter].dtype)
        if isinstance(self._optimizer, AdamBC):
            self._optimizer.noise_variance = (std / self._divisor) ** 2
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return self._release(scalars, step)

    def _riders(self) -> list[Coordinate]:
        return [name for name in self._part.noise_multipliers if name != "gradient"]

    def _centred(self, name: Coordinate, values: UnitValues) -> Tensor:
        if name == "loss":
            assert self._part.loss is not None
            return centred_losses(values.losses, self._part.loss)
        return centred_count(values.squared_norms, self.max_grad_norm)

    def _release(self, scalars: Mapping[Coordinate, Tensor], step: int) -> StepRelease:
        """Noises the scalars, moves the norm bound on, and tells what may be told."""
        part, loss = self._part, None
        for name, total in scalars.items():
            self._add_noise_(total, self._std(name), step, LOSS if name == "loss" else CLIP)
        if part.loss is not None:
            loss = mean_loss(scalars["loss"].item(), part.loss, self._divisor)
        if part.quantile is not None:
            count = scalars["quantile"].item()
            self.max_grad_norm = adapted(self.max_grad_norm, count, part.quantile, self._divisor, part.max_grad_norm)
        return StepRelease(loss)

    def _std(self, name: Coordinate) -> float:
        return noise_std(
            self._plan, self._part, name, max_grad_norm=self.max_grad_norm, half_precision=self._half_precision
        )

    def _add_noise_(
        self, total: Tensor, std: float, step: int, stream: str, name: str = "", divisor: float = 1.0
    ) -> None:
        """(total + noise) / divisor, in place."""
        if std == 0.0:
            total.div_(divisor)
            return
        self._randomness.add_noise_(
            total, std, phase=self._part.name, step=step, stream=stream, name=name, divisor=divisor
        )
