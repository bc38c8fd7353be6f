"""N: the noise's law, its independence, and that it is a function of (key, phase, step, stream, name) alone."""

from __future__ import annotations

import hashlib
import hmac
import math

import mpmath
import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from tests.trainer.dp.checks import check_noise
from worker.trainer.dp.randomness import JobRandomness, _BoxMuller

KEY = bytes(range(32))


def _noise(count: int, **names: object) -> torch.Tensor:
    arguments = {"phase": "main", "step": 0, "name": "w", **names}
    tensor = torch.zeros(count, dtype=torch.float64)
    JobRandomness(KEY).add_noise_(tensor, 1.0, **arguments)
    return tensor


def test_noise_of_a_step_has_the_plans_law() -> None:
    check_noise(JobRandomness(KEY))


def test_normals_against_a_second_implementation() -> None:
    """The stream's definition, written out: HMAC-SHA256 subkey, AES-256-CTR, 53-bit uniforms, Box-Muller."""
    parts = (b"privtune/dp/1", b"main", (5).to_bytes(8, "big"), b"noise", b"layer.weight")
    message = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    subkey = hmac.new(KEY, message, hashlib.sha256).digest()
    stream = Cipher(algorithms.AES(subkey), modes.CTR(bytes(16))).encryptor().update(bytes(8 * 10))
    words = [int.from_bytes(stream[8 * i : 8 * i + 8], "little") for i in range(10)]
    uniforms = [((word >> 11) + 0.5) / 2**53 for word in words]
    expected = [math.sqrt(-2 * math.log(uniforms[i])) * math.cos(2 * math.pi * uniforms[5 + i]) for i in range(5)]
    expected += [math.sqrt(-2 * math.log(uniforms[i])) * math.sin(2 * math.pi * uniforms[5 + i]) for i in range(5)]
    drawn = JobRandomness(KEY).normals(10, phase="main", step=5, stream="noise", name="layer.weight")
    assert np.allclose(drawn.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("seed", range(2))
def test_the_transform_equals_forty_digits(seed: int) -> None:
    """Box-Muller by mpmath, at random words and where the table's parts, the quarters and the interval end."""
    radius_bits = np.random.default_rng(seed).integers(0, 1 << 53, 400).tolist()
    angle_bits = np.random.default_rng(seed + 2).integers(0, 1 << 53, 400).tolist()
    edges = [
        part * (1 << 40) + rest for part in (0, 1, 1023, 1024, 2048, 5000, 6144, 8191) for rest in (0, (1 << 40) - 1)
    ]
    edges += [(1 << 53) - 1, 1 << 39, (1 << 39) - 1]
    radius_bits += [0, 1, (1 << 53) - 1, 1 << 52, *radius_bits[: len(edges)]]
    angle_bits += radius_bits[:4] + edges
    words = np.array([*radius_bits, *angle_bits], dtype=np.uint64) << np.uint64(11)
    words |= np.uint64(0x5A5)  # the lower bits take no part
    found = _BoxMuller(1.0, len(words), torch.device("cpu"))(words).tolist()
    with mpmath.workdps(40):
        for i, (k, a) in enumerate(zip(radius_bits, angle_bits, strict=True)):
            uniform = mpmath.mpf(float(k + 0.5)) / 2**53  # in float64, k + ½ may round to even
            radius, turn = mpmath.sqrt(-2 * mpmath.log(uniform)), 2 * (mpmath.mpf(a) + 0.5) / mpmath.mpf(2) ** 53
            for value, exact in ((found[i], mpmath.cospi(turn)), (found[len(radius_bits) + i], mpmath.sinpi(turn))):
                assert abs(value - radius * exact) <= 2.0**-51 * max(radius, mpmath.mpf(2) ** -60)


def test_noise_comes_before_the_division() -> None:
    count = (1 << 16) + 3
    base, divided = torch.linspace(-1, 1, count), torch.linspace(-1, 1, count)
    JobRandomness(KEY).add_noise_(divided, 0.7, phase="main", step=0, name="w", divisor=48.0)
    expected = (base.double() + 0.7 * _noise(count)) / 48.0
    assert torch.allclose(divided.double(), expected, rtol=1e-7, atol=0.0)


def test_normals_have_moments_shape_and_tail() -> None:
    sample = _noise(3_000_001).numpy()
    count = len(sample)
    assert abs(sample.mean()) < 4 / math.sqrt(count)
    assert abs(sample.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs(stats.skew(sample)) < 4 * math.sqrt(6 / count)
    assert abs(stats.kurtosis(sample)) < 4 * math.sqrt(24 / count)
    assert stats.kstest(sample, "norm").pvalue > 1e-3
    beyond = np.abs(sample) > 4.5
    expected = count * 2 * stats.norm.sf(4.5)
    assert abs(beyond.sum() - expected) < 5 * math.sqrt(expected)
    assert len(np.unique(sample)) == count  # 24-bit uniforms would collide


def test_halves_of_a_chunk_are_independent() -> None:
    """Cosines and sines share a radius: their squares would correlate if the angle were not uniform."""
    sample = _noise(1 << 16).numpy()
    first, second = sample[: 1 << 15], sample[1 << 15 :]
    for power in (1, 2):
        assert abs(np.corrcoef(first**power, second**power)[0, 1]) < 5 / math.sqrt(1 << 15)


@pytest.mark.parametrize(
    "other", [{"phase": "warm"}, {"step": 1}, {"stream": "release"}, {"name": "w2"}, {"phase": "mai", "name": "nw"}]
)
def test_streams_are_separate(other: dict[str, object]) -> None:
    first, second = _noise(10_000), _noise(10_000, **other)
    assert not torch.equal(first, second)
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.05


def test_another_key_is_another_stream() -> None:
    other = JobRandomness(bytes(32)).normals(100, phase="main", step=0, stream="noise", name="w")
    assert not torch.allclose(_noise(100), other)


def test_draws_have_no_history() -> None:
    used = JobRandomness(KEY)
    for step in range(3):
        used.uniform_u64(1000, phase="main", step=step, stream="sample")
    fresh = JobRandomness(KEY)
    for call in (used, fresh):
        assert np.array_equal(
            call.uniform_u64(70_000, phase="main", step=9, stream="sample")[:5],
            JobRandomness(KEY).uniform_u64(5, phase="main", step=9, stream="sample"),
        )


def test_noise_is_added_in_place_and_rounded_once() -> None:
    """Chunks do not show: the sum in float32 is the float64 stream, scaled, added and rounded."""
    count = 3 * (1 << 16) + 11
    base = torch.linspace(-1, 1, count)
    tensor = base.clone().view(1, count)
    JobRandomness(KEY).add_noise_(tensor, 0.7, phase="main", step=0, name="w")
    expected = base.double() + 0.7 * _noise(count)
    assert torch.allclose(tensor[0].double(), expected, rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="float32"):
        JobRandomness(KEY).add_noise_(torch.zeros(4, dtype=dtype), 1.0, phase="main", step=0)


def test_key_is_whole_and_stays_out_of_the_repr() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        JobRandomness(b"short")
    assert repr(JobRandomness(KEY)) == "JobRandomness()"


def test_torch_seed_is_public_sized_and_separate() -> None:
    seeds = {JobRandomness(KEY).torch_seed("main", step) for step in range(100)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
