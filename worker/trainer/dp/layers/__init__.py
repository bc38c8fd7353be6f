"""Functions that may use a trainable parameter, and how their backward fills the tape.

A handler takes (func, *args, **kwargs) as __torch_function__ does. A function that is not listed here sends the model
to the fallback engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from worker.trainer.dp.layers import convolution, elementwise, embedding, linear, normalization
from worker.trainer.dp.taped import Handler

HANDLERS: Mapping[Any, Handler] = {
    F.linear: linear.linear,
    torch.addmm: linear.addmm,
    F.embedding: embedding.embedding,
    F.layer_norm: normalization.layer_norm,
    F.rms_norm: normalization.rms_norm,
    F.group_norm: normalization.group_norm,
    F.batch_norm: normalization.batch_norm,
    F.conv1d: convolution.convolution,
    F.conv2d: convolution.convolution,
    **dict.fromkeys(
        (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__, Tensor.mul_),
        elementwise.broadcast,
    ),
    **dict.fromkeys(
        (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__, Tensor.add_),
        elementwise.addition,
    ),
    **dict.fromkeys((Tensor.expand, Tensor.expand_as), elementwise.expand),
    **dict.fromkeys((Tensor.to, Tensor.float, Tensor.type_as), elementwise.cast),
}
