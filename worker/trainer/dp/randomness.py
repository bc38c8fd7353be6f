"""Keyed, counter-based randomness: a secret draw is a pure function of (job key, phase, step, stream, name).

A replayed step draws what it drew before, whatever came in between: nothing here has state. Each stream has its own
AES-256 key, HMAC-SHA256 of the length-prefixed (phase, step, stream, name) under the job key, and its bytes are AES-CTR
from counter zero. Normals are float64 Box-Muller over 53-bit uniforms: 24-bit uniforms would cut the tail at 5.8 σ.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

#: Streams in use. Two purposes never share a stream: their draws would be the same bits.
SAMPLE = "sample"
NOISE = "noise"
SPLIT = "split"
RELEASE = "release"
ROWS = "rows"
CLIP = "clip"
LOSS = "loss"
DROPOUT = "dropout"

KEY_BYTES = 32
_DOMAIN = b"privtune/dp/1"
_CHUNK = 1 << 15  # normals per chunk, even: small enough to stay in cache
_ZEROS = bytes(8 * _CHUNK)


class _Keystream:
    """AES-256-CTR bytes from counter zero, read once and in order."""

    def __init__(self, key: bytes) -> None:
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self._buffer = bytearray(8 * _CHUNK + 15)

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """The next `count` 64-bit words, at most _CHUNK; writable, valid until the next call."""
        size = 8 * count
        written = self._encryptor.update_into(memoryview(_ZEROS)[:size], self._buffer)
        assert written == size
        return np.frombuffer(self._buffer, dtype="<u8", count=count)


@dataclass(frozen=True, slots=True)
class JobRandomness:
    """All secret randomness of one job. The key comes from the operating system's entropy and is never logged."""

    key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.key) != KEY_BYTES:
            raise ValueError(f"a job key has {KEY_BYTES} bytes")

    def subkey(self, phase: str, step: int, stream: str, name: str = "") -> bytes:
        """32 bytes that belong to this (phase, step, stream, name) alone."""
        parts = (_DOMAIN, phase.encode(), step.to_bytes(8, "big"), stream.encode(), name.encode())
        message = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
        return hmac.digest(self.key, message, hashlib.sha256)

    def uniform_u64(self, count: int, *, phase: str, step: int, stream: str, name: str = "") -> npt.NDArray[np.uint64]:
        """`count` independent uniform 64-bit integers, shape (count,)."""
        keystream = _Keystream(self.subkey(phase, step, stream, name))
        values = np.empty(count, dtype=np.uint64)
        for start in range(0, count, _CHUNK):
            stop = min(start + _CHUNK, count)
            values[start:stop] = keystream.words(stop - start)
        return values

    def add_noise_(
        self, tensor: Tensor, std: float, *, phase: str, step: int, stream: str = NOISE, name: str = ""
    ) -> None:
        """Adds N(0, std²) to each element of a contiguous float32 or float64 tensor, in place.

        The normals are float64 and rounded once, in the sum. Their bits are drawn on the CPU and, for a tensor
        elsewhere, moved there before the transform. Raises ValueError for half precision: it has too few values.
        """
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError("noise is added in float32 or float64")
        if not tensor.is_contiguous():
            raise ValueError("noise is added to contiguous tensors only")
        if not math.isfinite(std) or std < 0.0:
            raise ValueError("std must be finite and not negative")
        flat = tensor.detach().view(-1)
        keystream = _Keystream(self.subkey(phase, step, stream, name))
        buffer = torch.empty(2, _CHUNK, dtype=torch.float64, device=flat.device)
        for start in range(0, flat.numel(), _CHUNK):
            stop = min(start + _CHUNK, flat.numel())
            words = keystream.words(2 * ((stop - start + 1) // 2))
            words >>= np.uint64(11)
            flat[start:stop].add_(_normals(torch.from_numpy(words.view(np.int64)), std, buffer)[: stop - start])

    def normals(self, count: int, *, phase: str, step: int, stream: str, name: str = "") -> Tensor:
        """`count` independent standard normals, float64, shape (count,), on the CPU."""
        out = torch.zeros(count, dtype=torch.float64)
        self.add_noise_(out, 1.0, phase=phase, step=step, stream=stream, name=name)
        return out

    def torch_seed(self, phase: str, step: int, name: str = "") -> int:
        """A seed for torch's generator, for dropout masks: privacy rests on their independence across records alone."""
        return int.from_bytes(self.subkey(phase, step, DROPOUT, name)[:8], "big") >> 1


def _normals(words: Tensor, std: float, buffer: Tensor) -> Tensor:
    """Box-Muller: 2n words below 2⁵³ to 2n normals, first n from cosines, last n from sines; a view of `buffer`.

    A chunk is halved, not interleaved, to keep every operation contiguous. Chunk boundaries are fixed at multiples of
    _CHUNK, so the i-th normal of a stream depends on the stream, i and (in the last chunk) the number of elements.
    """
    half = words.numel() // 2
    uniforms, out = buffer[0, : 2 * half], buffer[1, : 2 * half]
    # (k + ½)·2⁻⁵³ lies in (0, 1]: the logarithm is finite and the largest normal is 8.6 σ.
    uniforms.copy_(words).add_(0.5)
    radius = uniforms[:half].mul_(2.0**-53).log_().mul_(-2.0 * std * std).sqrt_()
    angle = uniforms[half:].mul_(2.0 * math.pi * 2.0**-53)
    torch.cos(angle, out=out[:half])
    torch.sin(angle, out=out[half:])
    out[:half].mul_(radius)
    out[half:].mul_(radius)
    return out
