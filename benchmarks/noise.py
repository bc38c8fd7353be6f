"""What the noise of one step costs, by parameter: on a CPU and, where there is one, on a GPU, as ours and torch's.

    python -m benchmarks.noise [--rounds 5]

A BERT-like body's parameters (matrices, biases, norms), one call for each, as a step makes them. Medians over rounds of
wall time; beside them torch's own generator on the GPU (not cryptographic, float32), which is as fast as noise gets.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from worker.trainer.dp import randomness
from worker.trainer.dp.cuda_noise import noise_kernel
from worker.trainer.dp.randomness import JobRandomness

RANDOMNESS = JobRandomness(bytes(range(32)))


def parameters(width: int, layers: int, vocabulary: int, device: torch.device) -> list[Tensor]:
    """Zeros of the shapes that such an encoder's parameters have."""
    layer = [(width, width), (width,)] * 4 + [(4 * width, width), (4 * width,), (width, 4 * width)] + [(width,)] * 5
    return [torch.zeros(shape, device=device) for shape in [(vocabulary, width), (512, width), *layer * layers]]


def add_noise(tensors: Sequence[Tensor]) -> None:
    for place, tensor in enumerate(tensors):
        RANDOMNESS.add_noise_(tensor, 1.0, phase="main", step=0, name=str(place), divisor=64.0)


def add_torchs(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        tensor.add_(torch.randn_like(tensor)).div_(64.0)


def seconds(call: Callable[[Sequence[Tensor]], None], tensors: Sequence[Tensor], rounds: int) -> float:
    taken = []
    for _ in range(rounds + 1):
        _wait(tensors)
        start = time.perf_counter()
        call(tensors)
        _wait(tensors)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def _wait(tensors: Sequence[Tensor]) -> None:
    if tensors[0].is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    """Prints one line for each size and way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    devices = [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]
    for name, sizes in {"MiniLM": (384, 6, 30522), "RoBERTa-large": (1024, 24, 50265)}.items():
        for device in devices:
            tensors = parameters(*sizes, device)
            count = sum(tensor.numel() for tensor in tensors)
            ways: dict[str, Callable[[], float]] = {"ours": lambda t=tensors: seconds(add_noise, t, rounds)}
            if device.type == "cuda":
                ways["ours, without the kernel"] = lambda t=tensors: _without_kernel(t)
                ways["torch's generator"] = lambda t=tensors: seconds(add_torchs, t, rounds)
            for way, measure in ways.items():
                taken = measure()
                print(f"{name:14} {count / 1e6:6.1f} M  {device.type:5} {way:26} {1e3 * taken:9.2f} ms  "
                      f"{1e9 * taken / count:7.3f} ns a parameter", flush=True)  # fmt: skip


def _without_kernel(tensors: Sequence[Tensor]) -> float:
    randomness.noise_kernel = lambda device: None
    try:
        return seconds(add_noise, tensors, 1)
    finally:
        randomness.noise_kernel = noise_kernel


if __name__ == "__main__":
    main()
