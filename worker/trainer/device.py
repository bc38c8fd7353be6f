"""Where and how a job computes: device, threads, precision. Speed and memory only; privacy does not depend on it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from worker.trainer.spec import RuntimeOptions

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Device:
    """The device, and the type that matrix products compute in; norms, sums, noise and weights stay float32."""

    torch_device: torch.device
    precision: str
    threads: int

    @property
    def half_precision(self) -> bool:
        """Whether products round to 16 bits: the noise then covers a wider tolerance."""
        return self.precision in _DTYPES

    @property
    def dtype(self) -> torch.dtype:
        """What matrix products compute in."""
        return _DTYPES.get(self.precision, torch.float32)

    def autocast(self) -> AbstractContextManager[object]:
        """Around every forward pass."""
        if not self.half_precision:
            return nullcontext()
        return torch.autocast(self.torch_device.type, dtype=self.dtype)


def set_up_device(runtime: RuntimeOptions) -> Device:
    """Fixes device and threads for the process, and asks torch for deterministic kernels (warns where it has none)."""
    name = runtime.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    torch.use_deterministic_algorithms(True, warn_only=name != "cpu")
    return Device(torch.device(name), runtime.precision, torch.get_num_threads())
