"""The compiled path of scatter_sum; see cpu.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genkit import native


def refuses(x: Tensor, rows: Tensor, count: int) -> str | None:
    """Why these arguments need another path."""
    if x.device.type != "cpu":
        return f"it works in main memory, x is on {x.device}"
    return None if x.dtype == torch.float32 else f"it computes in float32, these are {x.dtype}"


def scatter_sum(x: Tensor, rows: Tensor, count: int) -> Tensor:
    """As `reference.scatter_sum`."""
    return _forward(x, rows, count)


@torch.library.custom_op("genkit::scatter_sum_cpu", mutates_args=(), device_types="cpu")
def _forward(x: Tensor, rows: Tensor, count: int) -> Tensor:
    out = torch.zeros(count, x.shape[1])
    native.function("scatter_sum", "scatter_sum", "pppii")(x.contiguous(), rows.contiguous(), out, *x.shape)
    return out


@_forward.register_fake
def _(x: Tensor, rows: Tensor, count: int) -> Tensor:
    return x.new_empty(count, x.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return dy.index_select(0, ctx.saved_tensors[0]), None, None


_forward.register_autograd(_gradients, setup_context=_save)
