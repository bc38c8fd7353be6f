"""Noise drawn where it is added: one kernel for a tensor on an NVIDIA GPU, of the same stream as on the CPU.

noise.cu is compiled for the GPU at hand by NVRTC, which torch's CUDA wheels bring along, through NVIDIA's own bindings,
which they bring too: in this process, without a compiler, a file or a socket.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("noise.cu")
_FUNCTIONS = {torch.float32: b"add_noise_float", torch.float64: b"add_noise_double"}
_THREADS = 256  # of a block, which keeps 33 KB of tables in shared memory: six fit a multiprocessor
_BLOCKS = 6
_ELEMENTS = 4  # of an item, see noise.cu

_log = logging.getLogger(__name__)


class _Key(ctypes.Structure):
    """An AES-256 key, by value."""

    _fields_ = (("words", ctypes.c_uint32 * 8),)


class NoiseKernel:
    """The kernel on one GPU."""

    def __init__(self, device: torch.device) -> None:
        """Compiles it: about a second, once in a process. Raises what NVRTC, the driver or a missing module raise."""
        from cuda.bindings import driver

        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # torch's context is this thread's, whoever asks first
            module = _checked(driver.cuModuleLoadData(_cubin(torch.cuda.get_device_capability(device))))
        self._functions = {
            dtype: _checked(driver.cuModuleGetFunction(module, name)) for dtype, name in _FUNCTIONS.items()
        }
        self._module = module  # alive as long as its functions
        self._driver = driver
        self._device = device
        self._most_blocks = _BLOCKS * torch.cuda.get_device_properties(device).multi_processor_count

    def add_(self, flat: Tensor, key: bytes, std: float, divisor: float) -> None:
        """(flat + N(0, std²)) / divisor in place, of a contiguous float32 or float64 tensor of shape (n,) on the GPU,
        on the current stream. key: 32 bytes, of this tensor and step alone."""
        if flat.numel() == 0:
            return
        arguments = (
            ctypes.c_void_p(flat.data_ptr()),
            ctypes.c_uint64(flat.numel()),
            _Key.from_buffer_copy(key),
            ctypes.c_double(std),
            ctypes.c_double(1.0 / divisor),
        )
        addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        items = -(-flat.numel() // _ELEMENTS)
        blocks = min(self._most_blocks, -(-items // _THREADS))
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream().cuda_stream
            launched = self._driver.cuLaunchKernel(
                self._functions[flat.dtype], blocks, 1, 1, _THREADS, 1, 1, 0, stream, ctypes.addressof(addresses), 0
            )
        _checked(launched)


@functools.cache
def noise_kernel(device: torch.device) -> NoiseKernel | None:
    """The kernel for `device`, or None where there is none to be had: the portable path is right, and slow."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    try:
        return NoiseKernel(device)
    except (ImportError, OSError, RuntimeError) as error:
        _log.warning("no noise kernel on %s, noise is drawn on the CPU: %s", device, error)
        return None


def _cubin(capability: tuple[int, int], source: Path = _SOURCE) -> bytes:
    """noise.cu for a GPU of that compute capability; needs none. Raises RuntimeError with the compiler's log."""
    from cuda.bindings import nvrtc

    program = _checked(nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), 0, [], []))
    options = [b"--gpu-architecture=sm_%d%d" % capability, b"--std=c++17"]
    compiled = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(compiled[0]) != 0:
        log = bytes(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(log.rstrip(b"\0").decode())
    cubin = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return cubin


def _checked(result: tuple[Any, ...]) -> Any:
    """What a call of the bindings returns beside its error code, which must be zero."""
    error, *values = result
    if int(error) != 0:
        raise RuntimeError(f"{type(error).__name__}: {error.name}")
    return values[0] if values else None
