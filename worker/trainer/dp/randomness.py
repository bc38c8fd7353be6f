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

from worker.trainer.dp.cuda_noise import noise_kernel

#: Streams in use. Two purposes never share a stream: their draws would be the same bits.
SAMPLE = "sample"
NOISE = "noise"
SPLIT = "split"
RELEASE = "release"
ROWS = "rows"
CLIP = "clip"
LOSS = "loss"
DROPOUT = "dropout"
INPUTS = "inputs"

KEY_BYTES = 32
_DOMAIN = b"privtune/dp/1"
_CHUNK = 1 << 16  # normals per chunk, even: enough for a call's cost not to show, few enough to stay in cache
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
        self,
        tensor: Tensor,
        std: float,
        *,
        phase: str,
        step: int,
        stream: str = NOISE,
        name: str = "",
        divisor: float = 1.0,
    ) -> None:
        """Adds N(0, std²) to each element of a contiguous float32 or float64 tensor and divides it, in place.

        The normals are float64 and rounded once, in the (divided) sum. A GPU draws them itself, by `cuda_noise`; where
        it cannot, their bits are drawn on the CPU and moved there before the transform. Which of them did shows in
        the last places only. Raises ValueError for half precision: it has too few values.
        """
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError("noise is added in float32 or float64")
        if not tensor.is_contiguous():
            raise ValueError("noise is added to contiguous tensors only")
        if not math.isfinite(std) or std < 0.0:
            raise ValueError("std must be finite and not negative")
        flat = tensor.detach().view(-1)
        key = self.subkey(phase, step, stream, name)
        kernel = noise_kernel(flat.device)
        if kernel is not None:
            kernel.add_(flat, key, std, divisor)
            return
        keystream = _Keystream(key)
        transform = _BoxMuller(std, min(_CHUNK, flat.numel() + flat.numel() % 2), flat.device)
        for start in range(0, flat.numel(), _CHUNK):
            target = flat[start : start + _CHUNK]
            normals = transform(keystream.words(2 * ((len(target) + 1) // 2)))[: len(target)]
            target.copy_(transform.wide[: len(target)].copy_(target).add_(normals).mul_(1.0 / divisor))

    def normals(self, count: int, *, phase: str, step: int, stream: str, name: str = "") -> Tensor:
        """`count` independent standard normals, float64, shape (count,), on the CPU."""
        out = torch.zeros(count, dtype=torch.float64)
        self.add_noise_(out, 1.0, phase=phase, step=step, stream=stream, name=name)
        return out

    def torch_seed(self, phase: str, step: int, name: str = "") -> int:
        """A seed for torch's generator, for dropout masks: privacy rests on their independence across records alone."""
        return int.from_bytes(self.subkey(phase, step, DROPOUT, name)[:8], "big") >> 1


class _BoxMuller:
    """2n words to 2n normals of one standard deviation, first n from cosines, last n from sines.

    A chunk is halved, not interleaved, to keep every operation contiguous. Chunk boundaries are fixed at multiples of
    _CHUNK, so the i-th normal of a stream depends on the stream, i and (in the last chunk) the number of elements.

    The two uniforms are (k + ½)·2⁻⁵³ of a word's upper 53 bits k. They lie in (0, 1]: the logarithm is finite and the
    largest normal is 8.6 σ. The angle 2π(k + ½)·2⁻⁵³ is the sum of that of a table, by the upper 13 bits of k, and a
    rest |x| ≤ π·2⁻¹³. With c, s from the table, cos = cos x (c - s tan x) and sin = cos x (s + c tan x);
    cos x is taken into the radius. The series' first omitted terms are below 2⁻⁵⁶; a test holds the whole to 2⁻⁵¹ of
    the radius.
    """

    def __init__(self, std: float, size: int, device: torch.device) -> None:
        """size: of the largest chunk; `wide` has room for what the normals are added to."""
        self._cos, self._sin = (table.to(device) for table in _TABLE)
        self._factor = -2.0 * std * std
        self._half_unit = torch.tensor(2.0**-54, dtype=torch.float64, device=device)
        self._middle = torch.tensor(-(2.0**39 - 0.5) * _UNIT, dtype=torch.float64, device=device)
        self._buffer = torch.empty(9 * (size // 2), dtype=torch.float64, device=device)
        self.wide = torch.empty(size, dtype=torch.float64, device=device)
        self._views: tuple[Tensor, ...] = ()

    def __call__(self, words: npt.NDArray[np.uint64]) -> Tensor:
        """Overwrites `words`; the result is valid until the next call."""
        half = len(words) // 2
        if not self._views or len(self._views[0]) != half:
            parts = self._buffer[: 9 * half].view(9, half)
            self._views = (*parts.unbind(), parts[7:].view(-1))
        radius, rest, square, tangent, shrink, cos, sin, first, last, out = self._views
        words >>= _ELEVEN
        index = torch.from_numpy((words[half:] >> _FORTY).view(np.int64)).to(cos.device)
        words[half:] &= _REST
        radius_bits, angle_bits = torch.from_numpy(words.view(np.int64)).view(2, half).unbind()
        torch.add(self._half_unit, radius.copy_(radius_bits), alpha=2.0**-53, out=radius)
        torch.add(self._middle, rest.copy_(angle_bits), alpha=_UNIT, out=rest)
        torch.mul(rest, rest, out=square)
        torch.addcmul(rest, rest, square, value=1.0 / 3.0, out=tangent)  # tan x = x + x³/3 + …
        torch.addcmul(square, square, square, value=-1.0 / 3.0, out=shrink)  # cos² x = 1 - (x² - x⁴/3 + …)
        if radius.device.type == "cpu":  # NumPy's logarithm and root take a third and two thirds of torch's time
            np.log(radius.numpy(), out=radius.numpy())
            radius.addcmul_(radius, shrink, value=-1.0).mul_(self._factor)
            np.sqrt(radius.numpy(), out=radius.numpy())
        else:
            radius.log_().addcmul_(radius, shrink, value=-1.0).mul_(self._factor).sqrt_()
        torch.index_select(self._cos, 0, index, out=cos)
        torch.index_select(self._sin, 0, index, out=sin)
        cos.mul_(radius)
        sin.mul_(radius)
        torch.addcmul(cos, sin, tangent, value=-1.0, out=first)
        torch.addcmul(sin, cos, tangent, out=last)
        return out


def _table() -> tuple[Tensor, Tensor]:
    """Cosine and sine at the middles of 2¹³ parts of a turn, from arguments within an eighth: right to the last bit."""
    turns = (np.arange(8192) + 0.5) / 8192
    quarter = np.rint(4 * turns)
    rest = 2.0 * np.pi * (turns - quarter / 4)
    quarter = quarter.astype(np.int64) % 4
    cos, sin = np.cos(rest), np.sin(rest)
    return (
        torch.from_numpy(np.choose(quarter, [cos, -sin, -cos, sin])),
        torch.from_numpy(np.choose(quarter, [sin, cos, -sin, -cos])),
    )


_TABLE = _table()
_ELEVEN, _FORTY, _REST = np.uint64(11), np.uint64(40), np.uint64(2**40 - 1)
_UNIT = 2.0 * math.pi * 2.0**-53  # of the angle
