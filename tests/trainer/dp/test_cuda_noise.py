"""noise.cu against the CPU's stream: its source compiled for this machine's CPU, and the kernel on a GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from worker.trainer.dp import cuda_noise, randomness
from worker.trainer.dp.cuda_noise import NoiseKernel, noise_kernel
from worker.trainer.dp.randomness import JobRandomness

RANDOMNESS = JobRandomness(bytes(range(1, 33)))
STREAM = {"phase": "main", "step": 3, "name": "w"}
STD, DIVISOR = 0.7, 48.0
CHUNK = randomness._CHUNK
#: Within a block of AES, around it, and where a chunk and its halves end.
COUNTS = [1, 2, 3, 4, 5, 6, 7, 1000, CHUNK, CHUNK + 1, CHUNK + 2, CHUNK + 3, 3 * CHUNK + 11]

with_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, to compile the kernel for this CPU")
with_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def _ramp(count: int) -> np.ndarray:
    return np.float32(0.001) * np.arange(count, dtype=np.float32)


def _on_the_cpu(count: int, dtype: torch.dtype) -> np.ndarray:
    tensor = torch.from_numpy(_ramp(count)).to(dtype)
    RANDOMNESS.add_noise_(tensor, STD, divisor=DIVISOR, **STREAM)
    return tensor.numpy()


def _check(count: int, narrow: np.ndarray, wide: np.ndarray) -> None:
    """The float64 sums agree within some last places of a normal (8.6 σ at most); rounded to float32 they are equal,
    but for the odd one that a last place carries over the middle between two values."""
    assert np.abs(wide - _on_the_cpu(count, torch.float64)).max() <= 2.0**-48 * STD + 2.0**-50 * _ramp(count).max()
    expected = _on_the_cpu(count, torch.float32)
    assert np.allclose(narrow, expected, rtol=2.0**-22, atol=1e-12)
    assert (narrow != expected).mean() < 1e-4


@pytest.fixture(scope="module")
def host_noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("host") / "host_noise"
    folders = ["-I", str(cuda_noise._SOURCE.parent)]
    source = Path(__file__).with_name("host_noise.cpp")
    subprocess.run(["g++", "-std=c++17", "-O1", *folders, "-o", str(made), str(source)], check=True)
    return made


@with_compiler
@pytest.mark.parametrize("count", COUNTS)
def test_the_kernels_source_draws_the_cpus_noise(host_noise: Path, count: int) -> None:
    key = np.frombuffer(RANDOMNESS.subkey("main", 3, "noise", "w"), dtype="<u4")
    order = [str(host_noise), str(count), repr(STD), repr(1.0 / DIVISOR), *(f"{word:x}" for word in key.tolist())]
    out = subprocess.run(order, check=True, capture_output=True).stdout
    _check(count, np.frombuffer(out[: 4 * count], "<f4"), np.frombuffer(out[4 * count :], "<f8"))


@with_gpu
@pytest.mark.parametrize("count", [*COUNTS, 20_000_003])
def test_a_gpu_draws_the_cpus_noise(count: int) -> None:
    drawn = {}
    for dtype in (torch.float32, torch.float64):
        tensor = torch.from_numpy(_ramp(count)).to(dtype).cuda()
        assert noise_kernel(tensor.device) is not None
        RANDOMNESS.add_noise_(tensor, STD, divisor=DIVISOR, **STREAM)
        drawn[dtype] = tensor.cpu().numpy()
    _check(count, drawn[torch.float32], drawn[torch.float64])


@with_gpu
def test_the_kernel_writes_nothing_else_and_takes_any_alignment() -> None:
    whole = torch.zeros(70_010, device="cuda")
    RANDOMNESS.add_noise_(whole[3:70_003], 1.0, **STREAM)
    alone = torch.zeros(70_000, device="cuda")
    RANDOMNESS.add_noise_(alone, 1.0, **STREAM)
    assert torch.equal(whole[3:70_003], alone)
    assert not whole[:3].any()
    assert not whole[70_003:].any()


@with_gpu
def test_a_gpu_without_the_kernel_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for kernel in (noise_kernel, lambda device: None):
        monkeypatch.setattr(randomness, "noise_kernel", kernel)
        drawn.append(torch.zeros(CHUNK + 11, dtype=torch.float64, device="cuda"))
        RANDOMNESS.add_noise_(drawn[-1], 1.0, **STREAM)
    assert torch.allclose(*drawn, rtol=0.0, atol=2.0**-48)


@with_gpu
def test_the_kernel_waits_for_its_stream() -> None:
    """It adds to what the stream before it computed, on whichever stream it is called."""
    stream = torch.cuda.Stream()
    expected = torch.full((CHUNK,), 4.0, device="cuda")
    RANDOMNESS.add_noise_(expected, 1.0, **STREAM)
    with torch.cuda.stream(stream):
        slow = torch.ones(4096, 4096, device="cuda")
        for _ in range(50):
            slow = slow @ slow / 4096.0
        tensor = torch.full((CHUNK,), 3.0, device="cuda") + slow[0, 0]
        RANDOMNESS.add_noise_(tensor, 1.0, **STREAM)
    stream.synchronize()
    assert torch.equal(tensor, expected)


def test_no_kernel_without_a_gpu_or_what_compiles_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert noise_kernel(torch.device("cpu")) is None

    def fails(self: NoiseKernel, device: torch.device) -> None:
        raise RuntimeError("nvrtcResult: NVRTC_ERROR_COMPILATION")

    monkeypatch.setattr(NoiseKernel, "__init__", fails)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    noise_kernel.cache_clear()
    assert noise_kernel(torch.device("cuda", 0)) is None
    noise_kernel.cache_clear()
