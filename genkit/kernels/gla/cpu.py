"""The compiled path of gla; see cpu.cpp and genkit/kernels/linear_attention.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genkit import memory, native

_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def refuses(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor, scale: float, reverse: bool
) -> str | None:
    """Why these arguments need another path."""
    return f"it computes in float32, these are {v.dtype}" if v.dtype == torch.float64 else None


def gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor, scale: float, reverse: bool
) -> tuple[Tensor, Tensor]:
    """As `reference.gla`."""
    return _forward(q, k, v, g, initial_state, scale, reverse)


def _plain(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.float().contiguous() for x in tensors)


@torch.library.custom_op("genkit::gla_cpu", mutates_args=(), device_types="cpu")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor, scale: float, reverse: bool
) -> tuple[Tensor, Tensor]:
    values = v.float().contiguous()
    o, state = memory.empty_like(values), memory.empty_like(initial_state)
    native.function("gla", "gla_forward", "pppppppiiiiifi")(
        *_plain(q, k), values, *_plain(g, initial_state), o, state, *q.shape, v.shape[3], scale, reverse
    )
    return o.to(v.dtype), state


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor, scale: float, reverse: bool
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), initial_state.new_empty(initial_state.shape)


@torch.library.custom_op("genkit::gla_cpu_backward", mutates_args=(), device_types="cpu")
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor,
    do: Tensor,
    dstate: Tensor,
    scale: float,
    reverse: bool,
) -> _Gradients:
    given = _plain(q, k, v, g, initial_state)
    found = [memory.empty_like(x) for x in given]
    native.function("gla", "gla_backward", "ppppppppppppiiiiifi")(
        *given, *_plain(do, dstate), *found, *q.shape, v.shape[3], scale, reverse
    )
    dq, dk, dv, dg, dinitial = found
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dg.to(g.dtype), dinitial


@_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor,
    do: Tensor,
    dstate: Tensor,
    scale: float,
    reverse: bool,
) -> _Gradients:
    dq, dk, dv, dg, dinitial = (x.new_empty(x.shape) for x in (q, k, v, g, initial_state))
    return dq, dk, dv, dg, dinitial


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, do: Tensor, dstate: Tensor) -> tuple[Any, ...]:
    return (*_backward(*ctx.saved_tensors, do, dstate, ctx.scale, ctx.reverse), None, None)


_forward.register_autograd(_gradients, setup_context=_save)
