"""Triton kernels of causal_conv1d: a program owns BT tokens by BD channels; rows that neighbours need too come from the cache."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genkit.dispatch import is_interpreting

# Tokens by channels: 32 values per thread at most are alive, nothing spilled on sm_80 and sm_90.
_TILE = {"BT": 32, "BD": 64}


@triton.jit
def _seen(x, state, batch, step, d, is_channel, N, D, K: tl.constexpr, REVERSE: tl.constexpr):
    # Row `step` of the input, counted in the direction of the convolution: below 0 of the state, whose rows stand in the order of tokens.
    token = N - 1 - step if REVERSE else step
    before = -1 - step if REVERSE else K - 1 + step
    inside = (step >= 0) & (step < N)
    outside = (step < 0) & (step >= 1 - K)
    own = tl.load(
        x + (batch * N + token)[:, None] * D + d[None, :], mask=inside[:, None] & is_channel[None, :], other=0.0
    )
    given = tl.load(
        state + (batch * (K - 1) + before)[:, None] * D + d[None, :],
        mask=outside[:, None] & is_channel[None, :],
        other=0.0,
    )
    return own.to(tl.float32) + given.to(tl.float32)  # [BT, BD], one of them is 0


@triton.jit
def _forward_kernel(
    x, weight, bias, state, y, N, D,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, REVERSE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    step = tl.program_id(2) * BT + tl.arange(0, BT)  # [BT]
    d = tl.program_id(1) * BD + tl.arange(0, BD)  # [BD]
    is_channel = d < D
    total = tl.zeros([BT, BD], tl.float32)
    for k in tl.static_range(K):
        tap = tl.load(weight + d * K + k, mask=is_channel, other=0.0).to(tl.float32)
        total += tap[None, :] * _seen(x, state, batch, step - (K - 1) + k, d, is_channel, N, D, K, REVERSE)
    if HAS_BIAS:
        total += tl.load(bias + d, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    if SILU:
        total = total / (1.0 + tl.exp(-total))
    token = N - 1 - step if REVERSE else step
    mask = (step < N)[:, None] & is_channel[None, :]
    tl.store(y + (batch * N + token)[:, None] * D + d[None, :], total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _weight_kernel(
    x, weight, bias, state, dy, inner, dweight, dbias, N, D,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, REVERSE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # inner [B, N, D]: the gradient in front of the activation, written where there is one.
    # dweight [B, blocks of tokens, K, D] and dbias [B, blocks, D] are added up afterwards.
    batch = tl.program_id(0).to(tl.int64)
    part = batch * tl.num_programs(2) + tl.program_id(2)
    step = tl.program_id(2) * BT + tl.arange(0, BT)  # [BT]
    d = tl.program_id(1) * BD + tl.arange(0, BD)  # [BD]
    is_channel = d < D
    token = N - 1 - step if REVERSE else step
    at = (batch * N + token)[:, None] * D + d[None, :]
    mask = (step < N)[:, None] & is_channel[None, :]
    g = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        total = tl.zeros([BT, BD], tl.float32)
        for k in tl.static_range(K):
            tap = tl.load(weight + d * K + k, mask=is_channel, other=0.0).to(tl.float32)
            total += tap[None, :] * _seen(x, state, batch, step - (K - 1) + k, d, is_channel, N, D, K, REVERSE)
        if HAS_BIAS:
            total += tl.load(bias + d, mask=is_channel, other=0.0).to(tl.float32)[None, :]
        open = 1.0 / (1.0 + tl.exp(-total))
        g *= open * (1.0 + total * (1.0 - open))
        tl.store(inner + at, g, mask=mask)
    for k in tl.static_range(K):
        seen = _seen(x, state, batch, step - (K - 1) + k, d, is_channel, N, D, K, REVERSE)
        tl.store(dweight + (part * K + k) * D + d, tl.sum(g * seen, 0), mask=is_channel)
    tl.store(dbias + part * D + d, tl.sum(g, 0), mask=is_channel)


@triton.jit
def _input_kernel(
    weight, inner, dx, dstate, N, D, K: tl.constexpr, REVERSE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):
    # The input of step s is seen with tap k by step s + K - 1 - k. Blocks begin K - 1 steps early, so that the first one covers the state.
    batch = tl.program_id(0).to(tl.int64)
    step = tl.program_id(2) * BT + tl.arange(0, BT) - (K - 1)  # [BT]
    d = tl.program_id(1) * BD + tl.arange(0, BD)  # [BD]
    is_channel = d < D
    total = tl.zeros([BT, BD], tl.float32)
    for k in tl.static_range(K):
        tap = tl.load(weight + d * K + k, mask=is_channel, other=0.0).to(tl.float32)
        seer = step + (K - 1 - k)
        token = N - 1 - seer if REVERSE else seer
        mask = ((seer >= 0) & (seer < N))[:, None] & is_channel[None, :]
        g = tl.load(inner + (batch * N + token)[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tap[None, :] * g
    token = N - 1 - step if REVERSE else step
    before = -1 - step if REVERSE else K - 1 + step
    inside = ((step >= 0) & (step < N))[:, None] & is_channel[None, :]
    outside = (step < 0)[:, None] & is_channel[None, :]
    tl.store(dx + (batch * N + token)[:, None] * D + d[None, :], total.to(dx.dtype.element_ty), mask=inside)
    tl.store(
        dstate + (batch * (K - 1) + before)[:, None] * D + d[None, :], total.to(dstate.dtype.element_ty), mask=outside
    )


def refuses(x: Tensor, *others: Any) -> str | None:
    """Why these arguments need another path."""
    return "it computes in float32, these are torch.float64" if x.dtype == torch.float64 else None


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor, has_silu: bool, reverse: bool
) -> Tensor:
    """As `reference.causal_conv1d`."""
    return _forward(x, weight, bias, initial_state, has_silu, reverse)


@torch.library.custom_op("genkit::causal_conv1d_triton", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor, has_silu: bool, reverse: bool
) -> Tensor:
    x, weight, initial_state = x.contiguous(), weight.contiguous(), initial_state.contiguous()
    y = torch.empty_like(x)
    B, N, D = x.shape
    blocks = _blocks(N, D)
    grid = (B, triton.cdiv(D, blocks["BD"]), triton.cdiv(N, blocks["BT"]))
    offset = x if bias is None else bias.contiguous()  # x is not read
    with torch.cuda.device_of(x):
        _forward_kernel[grid](
            x, weight, offset, initial_state, y, N, D,
            K=weight.shape[1], HAS_BIAS=bias is not None, SILU=has_silu, REVERSE=reverse, **blocks, num_warps=4,
        )  # fmt: skip
    return y


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor, has_silu: bool, reverse: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("genkit::causal_conv1d_triton_backward", mutates_args=())
def _backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor, dy: Tensor, has_silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias (float32, also where it is None), initial_state."""
    x, weight, initial_state, dy = x.contiguous(), weight.contiguous(), initial_state.contiguous(), dy.contiguous()
    B, N, D = x.shape
    K, blocks = weight.shape[1], _blocks(N, D)
    columns, parts = triton.cdiv(D, blocks["BD"]), triton.cdiv(N, blocks["BT"])
    dx, dstate = torch.empty_like(x), torch.empty_like(initial_state)
    dweight = x.new_empty(B, parts, K, D, dtype=torch.float32)
    dbias = x.new_empty(B, parts, D, dtype=torch.float32)
    inner = torch.empty_like(x, dtype=torch.float32) if has_silu else dy
    offset = x if bias is None else bias.contiguous()
    shared = {"K": K, "REVERSE": reverse, "num_warps": 4, **blocks}
    with torch.cuda.device_of(x):
        _weight_kernel[(B, columns, parts)](
            *(x, weight, offset, initial_state, dy, inner, dweight, dbias, N, D),
            HAS_BIAS=bias is not None, SILU=has_silu, **shared,
        )  # fmt: skip
        _input_kernel[(B, columns, triton.cdiv(N + K - 1, blocks["BT"]))](
            weight, inner, dx, dstate, N, D, **shared
        )  # fmt: skip
    return dx, dweight.sum((0, 1)).T.to(weight.dtype, memory_format=torch.contiguous_format), dbias.sum((0, 1)), dstate


@_backward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor, dy: Tensor, has_silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    single = x.new_empty(x.shape[2], dtype=torch.float32)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), single, initial_state.new_empty(initial_state.shape)


def _blocks(N: int, D: int) -> dict[str, int]:
    """Tokens and channels of a tile; small under the interpreter, so that small tensors have several."""
    if is_interpreting():
        return {"BT": 16, "BD": 16}
    return _TILE


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.has_silu, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, bias, initial_state = ctx.saved_tensors
    dx, dweight, dbias, dstate = _backward(x, weight, bias, initial_state, dy, ctx.has_silu, ctx.reverse)
    return dx, dweight, None if bias is None else dbias.to(bias.dtype), dstate, None, None


_forward.register_autograd(_gradients, setup_context=_save)


def variants() -> list[dict[str, Any]]:
    """What to compile ahead of time: four taps with bias and SiLU, as in Mamba, and eight."""
    found = []
    for kind in ("fp32", "bf16"):
        for taps in (4, 8):
            flags = {"K": taps, "HAS_BIAS": True, "SILU": True, "REVERSE": False, **_TILE}
            types = dict.fromkeys(("weight", "bias", "inner", "dweight", "dbias"), "*fp32") | {"N": "i32", "D": "i32"}
            for kernel, name in ((_forward_kernel, "forward"), (_weight_kernel, "weight"), (_input_kernel, "input")):
                constants = {key: value for key, value in flags.items() if key in kernel.arg_names}
                signature = {
                    key: "constexpr" if key in constants else types.get(key, f"*{kind}") for key in kernel.arg_names
                }
                found.append(
                    {
                        "kernel": kernel,
                        "name": f"causal_conv1d_{name}_{taps}_{kind}",
                        "signature": signature,
                        "constexprs": constants,
                        "num_warps": 4,
                        "num_stages": 2,
                    }
                )
    return found
