"""The compiled path of octree_attention; see cpu.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genkit import memory, native

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuses(q: Tensor, *rest: Any) -> str | None:
    """Why these arguments need another path."""
    return None if q.dtype in _DTYPES else f"it computes in float32, these are {q.dtype}"


def octree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch_ids: Tensor,
    bias: Tensor | None,
    depth: Tensor | None,
    window: int,
    dilation: int,
    shift: int,
    scale: float,
) -> Tensor:
    """As `reference.octree_attention`."""
    return _forward(q, k, v, batch_ids, bias, depth, window, dilation, shift, scale)[0]


@torch.library.custom_op("genkit::octree_attention_cpu", mutates_args=(), device_types="cpu")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch_ids: Tensor,
    bias: Tensor | None,
    depth: Tensor | None,
    window: int,
    dilation: int,
    shift: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    M, H, K = q.shape
    V = v.shape[-1]
    o, lse = memory.empty(M, H, V), memory.empty(H, M)
    sizes = (M, H, K, V, window, dilation, shift, bias is not None and len(bias) == 1)
    call = native.function("octree_attention", "octree_forward", "p" * 8 + "i" * 8 + "f")
    call(*_plain(q, k, v), batch_ids.contiguous(), *_plain(bias), _whole(depth), o, lse, *sizes, scale)
    return o.to(q.dtype), lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    M, H, _ = q.shape
    return q.new_empty(M, H, v.shape[-1]), q.new_empty(H, M, dtype=torch.float32)


@torch.library.custom_op("genkit::octree_attention_cpu_backward", mutates_args=(), device_types="cpu")
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch_ids: Tensor,
    bias: Tensor | None,
    depth: Tensor | None,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    window: int,
    dilation: int,
    shift: int,
    scale: float,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    M, H, K = q.shape
    V = v.shape[-1]
    delta = (do.float() * o.float()).sum(-1).T.contiguous()  # [H, M]
    dq, dk, dv = (memory.empty(*x.shape) for x in (q, k, v))
    dbias = torch.zeros(bias.shape if needs_bias and bias is not None else 0)
    sizes = (M, H, K, V, window, dilation, shift, bias is not None and len(bias) == 1)
    call = native.function("octree_attention", "octree_backward", "p" * 13 + "i" * 8 + "f")
    side = (batch_ids.contiguous(), *_plain(bias), _whole(depth), lse, *_plain(do), delta)
    call(*_plain(q, k, v), *side, dq, dk, dv, dbias if needs_bias else None, *sizes, scale)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), dbias.to(q.dtype)


@_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch_ids: Tensor,
    bias: Tensor | None,
    depth: Tensor | None,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    window: int,
    dilation: int,
    shift: int,
    scale: float,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = q.new_empty(bias.shape if needs_bias and bias is not None else 0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window, ctx.dilation, ctx.shift, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, do: Tensor, _: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    needs_bias = ctx.needs_input_grad[4]
    *found, dbias = _backward(*tensors, do, ctx.window, ctx.dilation, ctx.shift, ctx.scale, needs_bias)
    return (*found, None, dbias if needs_bias else None, *[None] * 5)


_forward.register_autograd(_gradients, setup_context=_save)


def _plain(*tensors: Tensor | None) -> list[Tensor | None]:
    """Contiguous, in float32."""
    return [None if x is None else x.float().contiguous() for x in tensors]


def _whole(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
