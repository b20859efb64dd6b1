"""The compiled path of selective_scan; see cpu.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genkit import memory, native


def refuses(u: Tensor, delta: Tensor, A: Tensor, *others: Any) -> str | None:
    """Why these arguments need another path."""
    if A.is_complex():
        return "it computes in real numbers, A is complex"
    return "it computes in float32, these are torch.float64" if u.dtype == torch.float64 else None


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D_skip: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """As `reference.selective_scan`; what is half precision is widened first."""
    given = (u, delta, A, B, C, D_skip, z, delta_bias, initial_state)
    will_differentiate = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    widened = [None if x is None else x.float() for x in given]
    out, last, _ = _forward(*widened, delta_softplus, reverse, will_differentiate)
    return out.to(u.dtype), last


_STEPS, _SPAN = 32, 64  # as in cpu.cpp


def _sizes(u: Tensor, B: Tensor) -> tuple[int, ...]:
    """batch, N, D, groups, R."""
    return (*u.shape, *B.shape[2:])


def _solid(*given: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in given]


@torch.library.custom_op("genkit::selective_scan_cpu", mutates_args=(), device_types="cpu")
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D_skip: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor,
    delta_softplus: bool,
    reverse: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and with `keep` the state before every _STEPS steps, [batch, ceil(N / _STEPS), R, D]; else an empty tensor."""
    given = _solid(u, delta, A, B, C, D_skip, z, delta_bias, initial_state)
    batch, N, D, _, R = _sizes(u, B)
    out, last = memory.empty_like(u), memory.empty(batch, D, R)
    kept = memory.empty(batch, -(-N // _STEPS), R, D) if keep else u.new_empty(0)
    run = native.function("selective_scan", "selective_scan_forward", "p" * 12 + "i" * 7)
    run(*given, out, last, kept if keep else None, *_sizes(u, B), delta_softplus, reverse)
    return out, last, kept


@_forward.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D_skip: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor,
    delta_softplus: bool,
    reverse: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, N, D, _, R = _sizes(u, B)
    kept = u.new_empty(batch, -(-N // _STEPS), R, D) if keep else u.new_empty(0)
    return u.new_empty(u.shape), initial_state.new_empty(batch, D, R), kept


@torch.library.custom_op("genkit::selective_scan_cpu_backward", mutates_args=(), device_types="cpu")
def _backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D_skip: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor,
    kept: Tensor,
    dout: Tensor,
    dlast: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> list[Tensor]:
    """Gradients of u, delta, A, B, C, D_skip, z, delta_bias, initial_state; an empty tensor where the input is None."""
    given = _solid(u, delta, A, B, C, D_skip, z, delta_bias, initial_state, kept, dout, dlast)
    batch, N, D, groups, R = _sizes(u, B)
    spans = -(-(D // groups) // _SPAN)
    du, ddelta, dz = (memory.empty_like(u) for _ in range(3))
    dB, dC = (memory.empty(batch, spans, N, groups, R) for _ in range(2))
    dA, dh0 = u.new_empty(batch, D, R), u.new_empty(batch, D, R)
    dskip, dbias = u.new_empty(batch, D), u.new_empty(batch, D)
    run = native.function("selective_scan", "selective_scan_backward", "p" * 21 + "i" * 7)
    run(
        *given,
        *(du, ddelta, dA, dB, dC),
        None if D_skip is None else dskip,
        None if z is None else dz,
        None if delta_bias is None else dbias,
        dh0,
        *_sizes(u, B),
        delta_softplus,
        reverse,
    )
    nothing = [u.new_empty(0) for _ in range(3)]
    return [
        du,
        ddelta,
        dA.sum(0),
        dB.sum(1),
        dC.sum(1),
        nothing[0] if D_skip is None else dskip.sum(0),
        nothing[1] if z is None else dz,
        nothing[2] if delta_bias is None else dbias.sum(0),
        dh0,
    ]


@_backward.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D_skip: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor,
    kept: Tensor,
    dout: Tensor,
    dlast: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> list[Tensor]:
    inputs = (u, delta, A, B, C, D_skip, z, delta_bias, initial_state)
    return [u.new_empty(0 if x is None else x.shape) for x in inputs]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.softplus, ctx.reverse, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)  # or the kept states, which have no gradient, would get one of zeros


def _gradients(ctx: Any, dout: Tensor | None, dlast: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    *inputs, kept = ctx.saved_tensors
    dout = torch.zeros_like(inputs[0]) if dout is None else dout
    found = _backward(*inputs, kept, dout, dlast, ctx.softplus, ctx.reverse)
    return (*(None if x is None else g for x, g in zip(inputs, found, strict=True)), None, None, None)


_forward.register_autograd(_gradients, setup_context=_save)
