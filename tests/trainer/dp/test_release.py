"""One-shot releases and the bound on what enters them; clipping rules."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from app.privacy.plan import GaussianRelease
from worker.trainer.dp.clipping import AUTOMATIC_GAMMA, clip_factors, clip_factors_by_parameter, clipping_sensitivity
from worker.trainer.dp.randomness import JobRandomness
from worker.trainer.dp.release import bounded_rows, gaussian_release

RANDOMNESS = JobRandomness(bytes(range(32)))
PART = GaussianRelease("mean", noise_multiplier=3.0, sensitivity=2.0)


def test_release_adds_the_plans_noise_once() -> None:
    total = torch.linspace(0, 5, 20_000).view(100, 200)
    released = gaussian_release(RANDOMNESS, PART, total)
    noise = (released - total.double()).flatten().numpy()
    assert released.dtype == torch.float64
    assert stats.kstest(noise / 6.0, "norm").pvalue > 1e-3
    assert abs(noise.std() / 6.0 - 1) < 5 / math.sqrt(2 * len(noise))
    assert torch.equal(released, gaussian_release(RANDOMNESS, PART, total))


def test_the_noise_covers_what_rounding_adds_to_the_sensitivity() -> None:
    exact = gaussian_release(RANDOMNESS, PART, torch.zeros(1000))
    torch.testing.assert_close(gaussian_release(RANDOMNESS, PART, torch.zeros(1000), tolerance=0.01), exact * 1.01)


def test_releases_have_streams_of_their_own() -> None:
    other = GaussianRelease("counts", noise_multiplier=3.0, sensitivity=2.0)
    total = torch.zeros(1000)
    assert not torch.equal(gaussian_release(RANDOMNESS, PART, total), gaussian_release(RANDOMNESS, other, total))


def test_a_total_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        gaussian_release(RANDOMNESS, PART, torch.tensor([1.0, torch.nan]))


def test_a_release_needs_noise() -> None:
    part = GaussianRelease("mean", noise_multiplier=0.0, sensitivity=1.0)
    with pytest.raises(ValueError, match="noise"):
        gaussian_release(RANDOMNESS, part, torch.zeros(3))


def test_rows_are_bounded_and_broken_ones_vanish() -> None:
    rows = bounded_rows(torch.tensor([[3.0, 4.0], [0.3, 0.4], [torch.inf, 1.0], [0.0, 0.0]]), 1.0)
    assert torch.allclose(rows, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0, 0], [0, 0]], dtype=torch.float64), atol=1e-7)


def test_flat_and_automatic_factors() -> None:
    norms = torch.tensor([0.0, 0.5, 1.0, 4.0, torch.inf, torch.nan])
    assert clip_factors("flat", norms, 1.0).tolist() == [1.0, 1.0, 1.0, 0.25, 0.0, 0.0]
    automatic = clip_factors("automatic", norms, 1.0)
    assert automatic[:4].tolist() == pytest.approx([1 / (n + AUTOMATIC_GAMMA) for n in (0.0, 0.5, 1.0, 4.0)])
    assert automatic[4:].tolist() == [0.0, 0.0]
    assert clip_factors("none", norms, 1.0).tolist() == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def test_sensitivities() -> None:
    assert clipping_sensitivity("flat", 0.3) == 0.3
    assert clipping_sensitivity("automatic", 0.3) == 1.0
    with pytest.raises(ValueError, match="bounds no contribution"):
        clipping_sensitivity("none", 0.3)
    assert clipping_sensitivity("per_layer", 0.3) == 0.3


def test_per_layer_factors() -> None:
    """Two layers: C / √2 each; weight and bias of one layer share its norm; a broken unit is left out of both."""
    squared = {
        "a.weight": torch.tensor([9.0, 0.01, torch.nan]),
        "a.bias": torch.tensor([16.0, 0.0, 0.0]),
        "b.weight": torch.tensor([0.01, 4.0, 0.01]),
    }
    factors = clip_factors_by_parameter("per_layer", squared, 1.0)
    bound = 1 / math.sqrt(2)
    assert factors["a.weight"].tolist() == pytest.approx([bound / 5, 1.0, 0.0])
    assert factors["a.bias"].tolist() == factors["a.weight"].tolist()
    assert factors["b.weight"].tolist() == pytest.approx([1.0, bound / 2, 0.0])
