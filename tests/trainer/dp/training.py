"""A small private job whose steps can be run, stopped and resumed; imports little, for processes of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.privacy.plan import PrivacyPlan, SampledGaussian
from worker.trainer.dp.engines import make_engine
from worker.trainer.dp.randomness import JobRandomness
from worker.trainer.dp.sampler import poisson_batch
from worker.trainer.dp.scalars import StepRelease
from worker.trainer.dp.step import PrivateStep


def plan_for(part: SampledGaussian, num_units: int = 1000) -> PrivacyPlan:
    return PrivacyPlan("dp_sgd", num_units, (part,), target_epsilon=1.0, target_delta=1e-5)


PART = SampledGaussian("main", sample_rate=0.1, num_steps=50, noise_multiplier=2.0, max_grad_norm=0.5, clipping="flat")


RANDOMNESS = JobRandomness(bytes(range(32)))
NUM_UNITS = 60


def record_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


DATA = {
    "x": torch.randn(NUM_UNITS, 6, generator=torch.Generator().manual_seed(1)),
    "y": torch.arange(NUM_UNITS) % 3,
}


class Training:
    """A small job: everything that a resume restores is the weights and the optimizer's state."""

    def __init__(
        self,
        part: SampledGaussian = PART,
        plan: PrivacyPlan | None = None,
        dropout: float = 0.0,
        device: torch.device | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 3)).to(device)
        self.data = {key: value.to(device) for key, value in DATA.items()}
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.01)
        engine = make_engine(
            self.model, list(self.parameters), record_loss, clipping=part.clipping, max_grad_norm=part.max_grad_norm
        )
        self.part, self.plan = part, plan or plan_for(part, NUM_UNITS)
        self.private_step = PrivateStep(
            engine, self.optimizer, self.parameters, plan=self.plan, part=part, randomness=RANDOMNESS
        )

    def drawn(self, index: int) -> Tensor:
        units = poisson_batch(
            RANDOMNESS, phase=self.part.name, step=index, num_units=NUM_UNITS, sample_rate=self.part.sample_rate
        )
        return torch.from_numpy(units).to(self.data["y"].device)

    def step(self, index: int, size: int = 4) -> StepRelease:
        units = self.drawn(index)
        chosen = units.split(size) if len(units) else ()
        batches = (({key: value[rows] for key, value in self.data.items()}, rows) for rows in chosen)
        return self.private_step.run(index, batches)

    def weights(self) -> torch.Tensor:
        return torch.cat([value.detach().flatten() for value in self.parameters.values()])
