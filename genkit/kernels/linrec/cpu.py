"""The compiled path of linrec; see cpu.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genkit import native


def refuses(a: Tensor, b: Tensor, h0: Tensor, reverse: bool) -> str | None:
    """Why these arguments need another path."""
    return None if b.dtype == torch.float32 else f"it computes in float32, these are {b.dtype}"


def linrec(a: Tensor, b: Tensor, h0: Tensor, reverse: bool) -> Tensor:
    """As `reference.linrec`."""
    return _forward(a, b, h0, reverse)


@torch.library.custom_op("genkit::linrec_cpu", mutates_args=(), device_types="cpu")
def _forward(a: Tensor, b: Tensor, h0: Tensor, reverse: bool) -> Tensor:
    a, b, h0 = a.contiguous(), b.contiguous(), h0.contiguous()
    h = torch.empty_like(b)
    native.function("linrec", "linrec_forward", "ppppiiii")(a, b, h0, h, *b.shape, reverse)
    return h


@_forward.register_fake
def _(a: Tensor, b: Tensor, h0: Tensor, reverse: bool) -> Tensor:
    return b.new_empty(b.shape)


@torch.library.custom_op("genkit::linrec_cpu_backward", mutates_args=(), device_types="cpu")
def _backward(a: Tensor, h: Tensor, h0: Tensor, dh: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    a, h0, dh = a.contiguous(), h0.contiguous(), dh.contiguous()
    da, db, dh0 = torch.empty_like(h), torch.empty_like(h), torch.empty_like(h0)
    native.function("linrec", "linrec_backward", "pppppppiiii")(a, h, h0, dh, da, db, dh0, *h.shape, reverse)
    return da, db, dh0


@_backward.register_fake
def _(a: Tensor, h: Tensor, h0: Tensor, dh: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(h.shape), h0.new_empty(h0.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, _, h0, ctx.reverse = inputs
    ctx.save_for_backward(a, output, h0)


def _gradients(ctx: Any, dh: Tensor) -> tuple[Any, ...]:
    return (*_backward(*ctx.saved_tensors, dh, ctx.reverse), None)


_forward.register_autograd(_gradients, setup_context=_save)
