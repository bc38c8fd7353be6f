"""Matrix products by the units of a processor that torch's default leaves idle.

On CPUs: torch's x86 builds multiply float32 matrices with Intel's MKL, which takes its AVX2 kernels on processors of
another maker: on a Zen 5 half the speed of oneDNN, which is in torch as well. Both are float32 throughout, and
deterministic. Which of the two a product takes is a function of the processor and the shapes alone, not of a timing.

On GPUs: norms and clipped sums of 16-bit operands are float32 products, which the tensor cores take from the operands
as they are. A product of two such numbers is exact in float32, and so is their sum up to float32's rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import has_torch_function

#: torch's own, whatever F.linear stands for at the moment.
_LINEAR = F.linear
#: Multiply-adds below which the call itself costs more than oneDNN saves.
_MIN_WORK = 1 << 21


def _mkl_is_slow() -> bool:
    try:
        vendor = "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return vendor and torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


#: Whether products of float32 matrices on this CPU go to oneDNN.
ONEDNN = _mkl_is_slow()


def _by_onednn(left: Tensor, right: Tensor, work: int) -> bool:
    return (
        ONEDNN
        and work >= _MIN_WORK
        and left.dtype == right.dtype == torch.float32
        and left.device.type == right.device.type == "cpu"
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: (…, d), weight: (p, d) with any strides, bias: (p,). x weightᵀ + bias, (…, p); not differentiable."""
    if _by_onednn(x, weight, x.numel() * weight.shape[0]) and (bias is None or bias.dtype == torch.float32):
        if not (weight.is_contiguous() or weight.t().is_contiguous()):
            weight = weight.contiguous()  # with gaps (one token of each row) oneDNN takes a thousand times as long
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return _LINEAR(x, weight, bias)


def add_product(target: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right, (p, d), for left (n, p) and right (n, d); added to `target` in place where there is one."""
    if _by_onednn(left, right, left.numel() * right.shape[1]):
        product = linear(left.t().contiguous(), right.t())
        return product if target is None else target.add_(product)
    return torch.mm(left.t(), right) if target is None else target.addmm_(left.t(), right)


def on_tensor_cores(operand: Tensor, dtype: torch.dtype) -> bool:
    """Whether products of such operands come out in `dtype` without their being widened first."""
    return dtype == torch.float32 and operand.device.type == "cuda" and operand.dtype in (torch.bfloat16, torch.float16)


def add_scaled_product(target: Tensor | None, left: Tensor, right: Tensor, scale: Tensor, scale_left: bool) -> Tensor:
    """leftᵀ (scale · right), (p, d), float32, for bfloat16 left (n, p) and right (n, d) on a GPU and float32 scale
    (n, 1); added to `target` in place where there is one. scale_left: which operand is scaled, the narrower one.

    That operand is split into two of 8 bits each, so that it is rounded to 16: in the worst case of terms that
    cancel, what `outer.rounded_up` adds to the norms leaves one unit's share of the sum at most 1 + 3e-5 times its
    bound. A single one of 8 bits would leave four times it.
    """
    scaled = (left if scale_left else right) * scale
    high = scaled.to(left.dtype)
    low = scaled.sub_(high).to(left.dtype)
    for part in (high, low):
        a, b = (part, right) if scale_left else (left, part)
        product = torch.mm(a.t(), b, out_dtype=torch.float32)
        target = product if target is None else target.add_(product)
    assert target is not None
    return target


def gram(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x xᵀ for each row, in `dtype`: (rows, T, d) to (rows, T, T)."""
    if on_tensor_cores(x, dtype):
        return torch.bmm(x, x.transpose(1, 2), out_dtype=dtype)
    x = x.to(dtype)
    rows, time, width = x.shape
    if not _by_onednn(x, x, time * time * width):
        return torch.bmm(x, x.transpose(1, 2))
    result = torch.empty(rows, time, time)
    for row, out in zip(x.unbind(), result.unbind(), strict=True):
        out.copy_(linear(row, row))
    return result


def outer(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """leftᵀ right for each row, in `dtype`: (rows, T, l) and (rows, T, r) to (rows, l, r)."""
    if on_tensor_cores(left, dtype) and left.dtype == right.dtype:
        return torch.bmm(left.transpose(1, 2), right, out_dtype=dtype)
    left, right = left.to(dtype), right.to(dtype)
    rows, time, width = left.shape
    if not _by_onednn(left, right, time * width * right.shape[2]):
        return torch.bmm(left.transpose(1, 2), right)
    result = torch.empty(rows, width, right.shape[2])
    for a, b, out in zip(left.unbind(), right.unbind(), result.unbind(), strict=True):
        out.copy_(linear(a.t().contiguous(), b.t()))
    return result


class FastLinear:
    """Within it, F.linear of plain tensors takes `linear` above, differentiably: for layers that do not train.

    By its name in torch, not by a TorchFunctionMode: that is off during backward, where checkpointed forwards run
    again and must save what they saved before.
    """

    def __enter__(self) -> None:
        self._before = F.linear
        F.linear = _fast_linear

    def __exit__(self, *_: object) -> None:
        F.linear = self._before


def _fast_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    mapped = torch._C._functorch.peek_interpreter_stack() is not None  # vmap knows no autograd functions of ours
    if mapped or not _on_cpu(input) or has_torch_function((input, weight, bias)):
        return _LINEAR(input, weight, bias)
    result = _FastLinear.apply(input, weight, bias)
    assert isinstance(result, Tensor)
    return result


def _on_cpu(x: Tensor) -> bool:
    return ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


class _FastLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        to_x = to_weight = to_bias = None
        flat = gradient.reshape(-1, gradient.shape[-1])
        if ctx.needs_input_grad[0]:
            to_x = linear(gradient, weight.t())
        if ctx.needs_input_grad[1]:
            for piece, rows in zip(flat.split(2048), x.reshape(-1, x.shape[-1]).split(2048), strict=True):
                to_weight = add_product(to_weight, piece, rows)
        if ctx.needs_input_grad[2]:
            to_bias = flat.sum(0)
        return to_x, to_weight, to_bias
