"""Plans for tests, of the shapes that the recipes make."""

from __future__ import annotations

from app.privacy.plan import GaussianRelease, Part, SampledGaussian


def sampled(name: str, rate: float, steps: int, sigma: float) -> SampledGaussian:
    return SampledGaussian(name, rate, steps, sigma, max_grad_norm=1.0, clipping="automatic")


def head(sigma: float) -> tuple[Part, ...]:
    """A head on frozen features: private centring, 160 steps at q = 1/8, evaluation on a split of the same data."""
    return (
        GaussianRelease("centring", 20.0, 1.0),
        sampled("head", 1 / 8, 160, sigma),
        GaussianRelease("evaluation", 12.0, 1.0),
    )


def warm_then_body(sigma: float) -> tuple[Part, ...]:
    """A head warmed at three times the main noise, then the body."""
    return (
        GaussianRelease("centring", 20.0, 1.0),
        sampled("head", 1 / 8, 80, 3.0 * sigma),
        sampled("body", 512 / 6920, 300, sigma),
        GaussianRelease("evaluation", 12.0, 1.0),
    )
