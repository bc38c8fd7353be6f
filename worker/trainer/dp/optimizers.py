"""Optimizers on noised gradients, schedules by step count, and averaging of weights: all post-processing.

DP-AdamBC subtracts the noise's known variance from Adam's second moment (Tang, Shpilevskiy & Lécuyer 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

Groups = Iterable[nn.Parameter] | Iterable[dict[str, Any]]


class AdamBC(Optimizer):
    """AdamW whose second moment is corrected for noise of a known variance.

    noise_variance: variance of the noise on each coordinate of the gradient that the optimizer sees, (std / divisor)²;
    set before each step, since it follows the norm bound where clipping is adaptive.
    floor: smallest corrected second moment, γ' of the paper: bounds the step where the signal drowns.
    """

    def __init__(
        self,
        params: Groups,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        noise_variance: float = 0.0,
        floor: float = 5e-8,
    ) -> None:
        if noise_variance < 0.0 or floor <= 0.0:
            raise ValueError("noise_variance must not be negative, floor must be positive")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.noise_variance = noise_variance
        self._floor = floor

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the parameters' `.grad`."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                    state["noise_sq"] = parameter.new_zeros(())
                state["step"] += 1
                count = float(state["step"])
                first: Tensor = state["exp_avg"]
                second: Tensor = state["exp_avg_sq"]
                first.lerp_(gradient, 1.0 - beta1)
                second.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
                state["noise_sq"].mul_(beta2).add_((1.0 - beta2) * self.noise_variance)  # as the second moment has it
                unbiased = 1.0 - beta2**count
                corrected = (second - state["noise_sq"]).div_(unbiased).clamp_(min=self._floor)
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                rate = group["lr"] / (1.0 - beta1**count)
                parameter.addcdiv_(first, corrected.sqrt_().add_(group["eps"]), value=-rate)


def make_optimizer(
    name: str,
    params: Groups,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
) -> Optimizer:
    """`adamw` (fused), `dp_adam_bc` (told the noise's variance by each step) or `sgd`; KeyError on another name."""
    makers: dict[str, Callable[[], Optimizer]] = {
        "adamw": lambda: AdamW(params, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True),
        "dp_adam_bc": lambda: AdamBC(params, lr=learning_rate, betas=betas, weight_decay=weight_decay),
        "sgd": lambda: SGD(params, lr=learning_rate, momentum=momentum, weight_decay=weight_decay),
    }
    return makers[name]()


def learning_rate_factor(schedule: str, step: int, *, num_steps: int, num_warmup_steps: int = 0) -> float:
    """What the learning rates of step `step` (from 0) are multiplied by: a function of the count, never of a loss.

    `constant`, `linear` or `cosine` (to zero) after a linear warm-up; KeyError on another name.
    """
    if step < num_warmup_steps:
        return (step + 1) / num_warmup_steps
    done = min(1.0, (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps))
    shapes = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return shapes[schedule]


class WeightAverage:
    """Exponential moving average of the weights, bias-corrected: post-processing of what the steps released."""

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError("decay must lie in [0, 1)")
        self._decay = decay
        self._count = 0
        self._sums = {name: torch.zeros_like(value, dtype=_wide(value)) for name, value in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor]) -> None:
        """Takes in the weights after a step."""
        self._count += 1
        for name, total in self._sums.items():
            total.lerp_(parameters[name].detach().to(total.dtype), 1.0 - self._decay)

    def average(self) -> dict[str, Tensor]:
        """The averaged weights, float32 or better; ValueError before the first update."""
        if self._count == 0:
            raise ValueError("nothing was averaged yet")
        correction = 1.0 - self._decay**self._count
        return {name: total / correction for name, total in self._sums.items()}

    @torch.no_grad()
    def copy_to(self, parameters: Mapping[str, Tensor]) -> None:
        """Writes the averaged weights into `parameters`."""
        for name, value in self.average().items():
            parameters[name].detach().copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"count": self._count, "sums": dict(self._sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self._count = int(state["count"])
        for name, total in self._sums.items():
            total.copy_(state["sums"][name])


def _wide(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)
