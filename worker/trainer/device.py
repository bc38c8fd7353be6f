"""Where and how a job computes: device, threads, precision. Speed and memory only; privacy does not depend on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from worker.trainer.dp.reduce import rank_and_world_size
from worker.trainer.spec import RuntimeOptions

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Device:
    """The device, and what matrix products of a training step compute in: norms, sums, noise and weights stay float32,
    and so does all that is released but for them (features, evaluation)."""

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


def set_up_device(runtime: RuntimeOptions) -> Device:
    """Fixes device and threads for the process, and asks torch for deterministic kernels (warns where it has none).

    Ranks take a GPU each, in turn where there are fewer, and share a CPU's cores.
    """
    name = device_type(runtime)
    rank, world_size = rank_and_world_size()
    torch.set_num_threads(runtime.threads or max(1, torch.get_num_threads() // world_size))
    torch.use_deterministic_algorithms(True, warn_only=name != "cpu")
    # Float32 means it: convolutions that round to TF32, as torch lets cuDNN do, would move the other units' gradients
    # by more than the noise's tolerance covers.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    # Nor do the parts of a 16-bit product's sum round to 16 bits on their way.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    device = torch.device(name)
    if name == "cuda":
        device = torch.device(name, rank % max(1, cuda_devices()))
        torch.cuda.set_device(device)
    return Device(device, runtime.precision, torch.get_num_threads())


def device_type(runtime: RuntimeOptions) -> str:
    """`cpu` or `cuda`: as asked for, or a GPU where there is one."""
    if runtime.device != "auto":
        return runtime.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def cuda_devices() -> int:
    """GPUs that this process sees."""
    return torch.cuda.device_count()
