"""The compiled path of linrec; see cpu.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genkit import memory, native

_WIDENED = (torch.bfloat16, torch.float16)


def refuses(a: Tensor, b: Tensor, h0: Tensor, reverse: bool) -> str | None:
    """Why these arguments need another path."""
    if b.dtype in (torch.float32, torch.complex64, *_WIDENED):
        return None
    return f"it computes in float32 and complex64, these are {b.dtype}"


def linrec(a: Tensor, b: Tensor, h0: Tensor, reverse: bool) -> Tensor:
    """As `reference.linrec`."""
    if b.dtype in _WIDENED:
        return _forward(a.float(), b.float(), h0.float(), reverse).to(b.dtype)
    return _forward(a, b, h0, reverse)


@torch.library.custom_op("genkit::linrec_cpu", mutates_args=(), device_types="cpu")
def _forward(a: Tensor, b: Tensor, h0: Tensor, reverse: bool) -> Tensor:
    a, b, h0 = a.contiguous(), b.contiguous(), h0.contiguous()
    h = memory.empty_like(b)
    native.function("linrec", "linrec_forward", "ppppiiiiiii")(a, b, h0, h, *_sizes(a, b), reverse)
    return h


@_forward.register_fake
def _(a: Tensor, b: Tensor, h0: Tensor, reverse: bool) -> Tensor:
    return b.new_empty(b.shape)


@torch.library.custom_op("genkit::linrec_cpu_backward", mutates_args=(), device_types="cpu")
def _backward(a: Tensor, h: Tensor, h0: Tensor, dh: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    a, h0, dh = a.contiguous(), h0.contiguous(), dh.contiguous()
    B, _, D = h.shape
    da = memory.empty(B, a.shape[1], D, dtype=a.dtype)
    db, dh0 = memory.empty_like(h), memory.empty_like(h0)
    native.function("linrec", "linrec_backward", "pppppppiiiiiii")(a, h, h0, dh, da, db, dh0, *_sizes(a, h), reverse)
    return da if a.shape[0] == B else da.sum(0, keepdim=True), db, dh0


@_backward.register_fake
def _(a: Tensor, h: Tensor, h0: Tensor, dh: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape), h.new_empty(h.shape), h0.new_empty(h0.shape)


def _sizes(a: Tensor, b: Tensor) -> tuple[int, ...]:
    """B, N, D in floats, the floats from one batch entry and from one token of a to the next, whether numbers are complex."""
    B, N, D = b.shape
    floats = 2 if b.is_complex() else 1
    a_step = D * floats if a.shape[1] > 1 else 0
    return B, N, D * floats, a.shape[1] * D * floats if a.shape[0] > 1 else 0, a_step, int(b.is_complex())


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, _, h0, ctx.reverse = inputs
    ctx.save_for_backward(a, output, h0)


def _gradients(ctx: Any, dh: Tensor) -> tuple[Any, ...]:
    return (*_backward(*ctx.saved_tensors, dh, ctx.reverse), None)


_forward.register_autograd(_gradients, setup_context=_save)
