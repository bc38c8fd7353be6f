"""The private loss curve: what is read off the noised loss sums of a plan's steps. All of it is post-processing.

One step's figure is B/2 + (Σ (loss - B/2) + noise) / (q · N): an unbiased estimate of the mean over all units of their
losses, each clipped to [0, B]. A point averages it over a window of steps, wide enough for its noise to be readable;
windows follow from the plan alone, so that a resumed job makes the very points that it would have made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from app.privacy.plan import Part, PrivacyPlan, SampledGaussian

#: A point's noise has at most this standard deviation, as a fraction of the bound, where the steps allow it; but a
#: phase has at least so many points (as long as it has the steps), however noisy, and at most so many.
READABLE = 0.02
_LEAST_POINTS, _MOST_POINTS = 8, 50

_Z95 = 1.959964


def noise_std(plan: PrivacyPlan, part: SampledGaussian) -> float:
    """Standard deviation of the noise on the mean loss that one step releases, by the plan; 0 without a mechanism.

    A little more is drawn, against rounding.
    """
    assert part.loss is not None
    sensitivity = part.loss.bound / 2.0
    return part.noise_multipliers["loss"] * sensitivity / plan.expected_batch_size(part)


def window_ends(plan: PrivacyPlan, part: SampledGaussian) -> list[int]:
    """Steps of the part after which a point is complete, the last step among them; none without a loss."""
    if part.loss is None:
        return []
    readable = math.ceil((noise_std(plan, part) / (READABLE * part.loss.bound)) ** 2)
    widest = max(1, part.num_steps // _LEAST_POINTS)
    width = min(max(readable, math.ceil(part.num_steps / _MOST_POINTS), 1), widest)
    ends = [width * (index + 1) for index in range(max(1, round(part.num_steps / width)))]
    return [*ends[:-1], part.num_steps]


def points(
    plan: PrivacyPlan,
    losses: Mapping[str, Sequence[float]],
    stds: Mapping[str, float],
    after: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """The points that are complete: {phase, step, train_loss, train_loss_noise_std}, in order of execution.

    losses: what each step released so far, by part. stds: of the noise that was drawn on one step's, by part.
    after: steps of each part of which the points are known already. A point's step counts all the plan's steps, so
    that it rises from phase to phase.
    """
    found = []
    for part in plan.parts:
        released = losses.get(part.name, ())
        ends = window_ends(plan, part) if isinstance(part, SampledGaussian) else []
        for start, end in zip([0, *ends], ends, strict=False):
            if (after or {}).get(part.name, 0) < end <= len(released):
                count = end - start
                point = {"phase": part.name, "step": _before(plan, part) + end}
                mean, std = math.fsum(released[start:end]) / count, stds[part.name] / math.sqrt(count)
                found.append({**point, "train_loss": mean, "train_loss_noise_std": std})
    return found


def is_point(
    plan: PrivacyPlan, point: Mapping[str, Any], executed: Mapping[str, int], after: Mapping[str, int]
) -> bool:
    """Whether a point of this form belongs to the plan, has been executed with no less noise, and was not known."""
    part = next((part for part in plan.parts if part.name == point.get("phase")), None)
    step, figures = point.get("step"), [point.get("train_loss"), point.get("train_loss_noise_std")]
    if not isinstance(part, SampledGaussian) or not isinstance(step, int) or isinstance(step, bool):
        return False
    end, ends = step - _before(plan, part), window_ends(plan, part)
    sound = all(isinstance(f, int | float) and not isinstance(f, bool) and math.isfinite(f) for f in figures)
    if not sound or end not in ends or len(point) != 4:
        return False
    least = noise_std(plan, part) / math.sqrt(_steps(ends, end))
    return point["train_loss_noise_std"] >= least * (1 - 1e-9) and (
        after.get(part.name, 0) < end <= executed.get(part.name, 0)
    )


def described(plan: PrivacyPlan, point: Mapping[str, Any]) -> dict[str, Any]:
    """A point and its uncertainty, in the words of the wire; cut to [0, B] last of all.

    train_loss_interval_95: of the noise, and of which units were drawn (at most B²/4 · (1 - q) / (q · N) a step).
    """
    part = plan.part(point["phase"])
    assert isinstance(part, SampledGaussian)
    assert part.loss is not None
    bound, ends = part.loss.bound, window_ends(plan, part)
    steps = _steps(ends, point["step"] - _before(plan, part))
    drawn = bound**2 / 4.0 * (1.0 - part.sample_rate) / plan.expected_batch_size(part) / steps
    half_width = _Z95 * math.sqrt(point["train_loss_noise_std"] ** 2 + drawn)

    def cut(value: float) -> float:
        return min(bound, max(0.0, value))

    loss = point["train_loss"]
    return {
        "phase": part.name,
        "step": point["step"],
        "train_loss": cut(loss),
        "train_loss_noise_std": point["train_loss_noise_std"],
        "train_loss_interval_95": [cut(loss - half_width), cut(loss + half_width)],
    }


def _steps(ends: Sequence[int], end: int) -> int:
    index = ends.index(end)
    return end - (ends[index - 1] if index else 0)


def _before(plan: PrivacyPlan, part: Part) -> int:
    return sum(earlier.num_steps for earlier in plan.parts[: plan.parts.index(part)])
