"""Text regression: a text or a pair of texts, and a number within a declared range.

The model learns the target scaled to [-1, 1]; on export the scale is folded into its linear head, so that the bundle
answers in the target's own units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from worker.trainer.failure import TrainerFailure
from worker.trainer.tasks.examples import Examples, Indices, lengths_of
from worker.trainer.tasks.interface import Batch, TextTask, on_device, text_inputs
from worker.trainer.tasks.noise import MOST_NOISE, Z95, readable, share_interval

#: What the middle of the range, said of every row, errs at most: in `statistics`' units, and a quarter of its square.
_ERROR_OF_THE_MIDDLE, _SQUARE_OF_THE_MIDDLE = 1 / 2, 1 / 4


class TextRegression(TextTask):
    """The task, bound to one job's tokenizer and range."""

    pipeline_tag: ClassVar[str] = "text-classification"

    def usage(self, options: str = "") -> str:
        """By a pipeline, whose score is the number."""
        return super().usage(", truncation=True" + options)

    @property
    def centre(self) -> float:
        """Of the declared range."""
        low, high = self.spec.options["range"]
        return float(low + high) / 2.0

    @property
    def half(self) -> float:
        """Half the width of the declared range."""
        low, high = self.spec.options["range"]
        return float(high - low) / 2.0

    def encode(self, columns: Mapping[str, Sequence[Any]]) -> Examples:
        """Roles `text`, `text_pair`, `target`: decimal numbers; what lies beyond the range is cut off."""
        inputs, lost = self.encode_texts(columns)
        try:
            targets = torch.tensor([float(cell) for cell in columns["target"]], dtype=torch.float64)
        except (TypeError, ValueError):
            raise TrainerFailure("data_mismatch", "a target is no number") from None
        if not bool(torch.isfinite(targets).all()):
            raise TrainerFailure("data_mismatch", "a target is not finite")
        scaled = ((targets - self.centre) / self.half).clamp(-1.0, 1.0).to(torch.float32)
        return Examples(inputs, {"targets": scaled}, lengths_of(inputs["input_ids"]), lost)

    def synthetic(self, model: PreTrainedModel, rows: int) -> Examples:
        """Random ids, targets over the range."""
        inputs = self.synthetic_inputs(model, rows)
        return Examples(inputs, {"targets": torch.linspace(-1.0, 1.0, rows)}, lengths_of(inputs["input_ids"]))

    def batch(self, examples: Examples, rows: Indices, device: torch.device) -> dict[str, Tensor]:
        """input_ids, attention_mask, token_type_ids (rows, length); targets (rows,), scaled to [-1, 1]."""
        return on_device(self.padded_inputs(examples, rows), device) | self.targets(examples, rows, device)

    def targets(self, examples: Examples, rows: Indices, device: torch.device) -> dict[str, Tensor]:
        """targets (rows,)."""
        return on_device({"targets": examples.tensors["targets"][torch.as_tensor(np.asarray(rows))]}, device)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows, 1)."""
        logits: Tensor = model(**text_inputs(batch)).logits
        return logits.float()

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Squared error, of the scaled target."""
        return (outputs[:, 0] - batch["targets"]).square()

    def statistics(self, outputs: Tensor, batch: Batch) -> Tensor:
        """(rows, 6): |u - v| / 2, u, v, u², v², u·v of the scaled target u and prediction v, both cut to [-1, 1]."""
        u = batch["targets"].to(device="cpu", dtype=torch.float64)
        v = outputs[:, 0].to(device="cpu", dtype=torch.float64).nan_to_num(nan=0.0).clamp(-1.0, 1.0)
        return torch.stack([(u - v).abs() / 2.0, u, v, u * u, v * v, u * v], 1)

    def metrics(self, totals: Tensor, num_units: int, noise_std: float = 0.0) -> dict[str, Any]:
        """MAE and RMSE in the target's units, R², Pearson's correlation, by moments."""
        return regression_metrics(totals, num_units, noise_std, self.half)

    def card(self, metrics: Mapping[str, Any]) -> list[str]:
        """Errors with their intervals."""
        lines = []
        for name, said in (("rmse", "root mean squared error"), ("mae", "mean absolute error")):
            if name in metrics:
                low, high = metrics[f"{name}_interval_95"]
                lines.append(f"- {said} {metrics[name]:.4g} (95 % interval {low:.4g} to {high:.4g})")
        if "r2" in metrics:
            lines.append(f"- R² {metrics['r2']:.4f}, correlation {metrics['correlation']:.4f}")
        return lines

    @torch.no_grad()
    def finish(self, head: nn.Module) -> None:
        """From [-1, 1] to the declared range, exactly."""
        assert isinstance(head, nn.Linear)
        head.weight.mul_(self.half)
        head.bias.mul_(self.half).add_(self.centre)


def regression_metrics(totals: Tensor, num_units: int, noise_std: float, half: float) -> dict[str, Any]:
    """totals: (6,), `statistics` summed over units, with noise of that standard deviation on each; half: of the range.

    Intervals cover the noise and the finite number of units. What the noise hides is left out, by name: errors where
    its half-width is half of what the middle of the range errs at most, R² and the correlation where it is half of the
    variances that they divide by.
    """
    absolute, u, v, uu, vv, uv = (float(value) / num_units for value in totals)
    mae = min(1.0, max(0.0, absolute))
    # A quarter of the squared error lies in [0, 1], and is a sum of three noised means with factors 1, 1 and -2.
    squared = min(1.0, max(0.0, (uu - 2.0 * uv + vv) / 4.0))
    on_squared = noise_std * math.sqrt(6.0) / 4.0
    low, high = share_interval(squared, num_units, on_squared)
    found: dict[str, Any] = {}
    withheld: dict[str, str] = {}
    if readable(num_units * _ERROR_OF_THE_MIDDLE, noise_std):
        found["mae"] = 2.0 * half * mae
        found["mae_interval_95"] = [2.0 * half * bound for bound in share_interval(mae, num_units, noise_std)]
    else:
        withheld["mae"] = "noise"
    if readable(num_units * _SQUARE_OF_THE_MIDDLE, on_squared):
        found["rmse"] = 2.0 * half * math.sqrt(squared)
        found["rmse_interval_95"] = [2.0 * half * math.sqrt(low), 2.0 * half * math.sqrt(high)]
    else:
        withheld["rmse"] = "noise"
    variance, of_prediction = uu - u * u, vv - v * v
    # Of uu - u²: the noise on uu, and twice u times that on u.
    half_width = Z95 * noise_std / num_units * math.sqrt(1.0 + 4.0 * max(u * u, v * v))
    if half_width <= MOST_NOISE * min(variance, of_prediction) and min(variance, of_prediction) > 0.0:
        correlation = (uv - u * v) / math.sqrt(variance * of_prediction)
        found["r2"] = 1.0 - 4.0 * squared / variance
        found["correlation"] = min(1.0, max(-1.0, correlation))
    else:
        withheld |= {"r2": "noise", "correlation": "noise"}
    return {**found, **({"not_released": withheld} if withheld else {})}
