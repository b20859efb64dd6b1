"""The compiled path of causal_conv1d; see cpu.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genkit import memory, native

_SEGMENT = 128  # as in cpu.cpp


def refuses(x: Tensor, *others: Any) -> str | None:
    """Why these arguments need another path."""
    return "it computes in float32, these are torch.float64" if x.dtype == torch.float64 else None


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor, has_silu: bool, reverse: bool
) -> Tensor:
    """As `reference.causal_conv1d`; what is half precision is widened first."""
    bias = None if bias is None else bias.float()
    return _forward(x.float(), weight.float(), bias, initial_state.float(), has_silu, reverse).to(x.dtype)


@torch.library.custom_op("genkit::causal_conv1d_cpu", mutates_args=(), device_types="cpu")
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor, has_silu: bool, reverse: bool
) -> Tensor:
    x, taps, initial_state = x.contiguous(), weight.T.contiguous(), initial_state.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = memory.empty_like(x)
    run = native.function("causal_conv1d", "causal_conv1d_forward", "p" * 5 + "i" * 6)
    run(x, taps, bias, initial_state, y, *x.shape, len(taps), has_silu, reverse)
    return y


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor, has_silu: bool, reverse: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("genkit::causal_conv1d_cpu_backward", mutates_args=(), device_types="cpu")
def _backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor, dy: Tensor, has_silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias (also where it is None), initial_state."""
    x, taps, initial_state, dy = x.contiguous(), weight.T.contiguous(), initial_state.contiguous(), dy.contiguous()
    bias = None if bias is None else bias.contiguous()
    B, N, D = x.shape
    K = len(taps)
    segments = -(-N // _SEGMENT)
    dx, dstate = memory.empty_like(x), memory.empty_like(initial_state)
    dtaps, dbias = x.new_empty(B, segments, K, D), x.new_empty(B, segments, D)
    run = native.function("causal_conv1d", "causal_conv1d_backward", "p" * 9 + "i" * 6)
    run(x, taps, bias, initial_state, dy, dx, dtaps, dbias, dstate, B, N, D, K, has_silu, reverse)
    return dx, dtaps.sum((0, 1)).T.contiguous(), dbias.sum((0, 1)), dstate


@_backward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor, dy: Tensor, has_silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    D = x.shape[2]
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        x.new_empty(D),
        initial_state.new_empty(initial_state.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.has_silu, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, bias, initial_state = ctx.saved_tensors
    dx, dweight, dbias, dstate = _backward(x, weight, bias, initial_state, dy, ctx.has_silu, ctx.reverse)
    return dx, dweight, None if bias is None else dbias, dstate, None, None


_forward.register_autograd(_gradients, setup_context=_save)
