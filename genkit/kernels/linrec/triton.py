"""Triton kernels of linrec: a program owns a block of channels of one batch entry and walks over the tokens in chunks; within a chunk the steps are
combined in parallel, (a1, b1) then (a2, b2) = (a1 a2, a2 b1 + b2), and the last row is carried on. Complex numbers are pairs of floats."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genkit.dispatch import is_interpreting

# Tokens and channels per tile: about 120 registers of a thread, nothing spilled on sm_80 and sm_90.
_TILE = {"BT": 64, "BD": 32}
_COMPLEX_TILE = {"BT": 32, "BD": 16}


@triton.jit
def _then(a1, b1, a2, b2):
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _then_complex(ar1, ai1, br1, bi1, ar2, ai2, br2, bi2):
    return (
        ar1 * ar2 - ai1 * ai2,
        ar1 * ai2 + ai1 * ar2,
        ar2 * br1 - ai2 * bi1 + br2,
        ar2 * bi1 + ai2 * br1 + bi2,
    )


@triton.jit
def _forward_kernel(
    a, b, h0, h, N, D, a_batch, a_step,
    REVERSE: tl.constexpr, COMPLEX: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)  # [BD]
    S: tl.constexpr = 2 if COMPLEX else 1  # floats per number
    is_channel = d < D
    carry = tl.load(h0 + (batch * D + d) * S, mask=is_channel, other=0.0).to(tl.float32)  # [BD]
    if COMPLEX:
        carry_i = tl.load(h0 + (batch * D + d) * S + 1, mask=is_channel, other=0.0).to(tl.float32)
    rows = tl.arange(0, BT)  # [BT]
    is_last = (rows == BT - 1)[:, None]
    for start in range(0, N, BT):
        step = (start + rows).to(tl.int64)
        t = N - 1 - step if REVERSE else step
        mask = (step < N)[:, None] & is_channel[None, :]  # [BT, BD]
        at = a + (batch * a_batch + t[:, None] * a_step + d[None, :]) * S
        bt = b + ((batch * N + t[:, None]) * D + d[None, :]) * S
        # Rows behind the end pass the state on: a = 1, b = 0.
        x = tl.load(at, mask=mask, other=1.0).to(tl.float32)
        y = tl.load(bt, mask=mask, other=0.0).to(tl.float32)
        if COMPLEX:
            x_i = tl.load(at + 1, mask=mask, other=0.0).to(tl.float32)
            y_i = tl.load(bt + 1, mask=mask, other=0.0).to(tl.float32)
            x, x_i, y, y_i = tl.associative_scan((x, x_i, y, y_i), 0, _then_complex)
            state = y + x * carry[None, :] - x_i * carry_i[None, :]
            state_i = y_i + x * carry_i[None, :] + x_i * carry[None, :]
            tl.store(h + ((batch * N + t[:, None]) * D + d[None, :]) * S + 1, state_i, mask=mask)
            carry_i = tl.sum(tl.where(is_last, state_i, 0.0), 0)
        else:
            x, y = tl.associative_scan((x, y), 0, _then)
            state = y + x * carry[None, :]
        tl.store(h + ((batch * N + t[:, None]) * D + d[None, :]) * S, state.to(h.dtype.element_ty), mask=mask)
        carry = tl.sum(tl.where(is_last, state, 0.0), 0)


@triton.jit
def _backward_kernel(
    a, h, h0, dh, da, db, dh0, N, D, a_batch, a_step,
    CONSTANT: tl.constexpr, REVERSE: tl.constexpr, COMPLEX: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # lambda_t = dh_t + conj(a_{t+1}) lambda_{t+1}; db_t = lambda_t, da_t = lambda_t conj(h_{t-1}), dh0 = conj(a_1) lambda_1.
    batch = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)  # [BD]
    S: tl.constexpr = 2 if COMPLEX else 1
    is_channel = d < D
    rows = tl.arange(0, BT)
    is_last = (rows == BT - 1)[:, None]
    carry = tl.zeros([BD], tl.float32)
    total = tl.zeros([BD], tl.float32)  # of da, when all tokens share a
    if COMPLEX:
        carry_i = tl.zeros([BD], tl.float32)
        total_i = tl.zeros([BD], tl.float32)
    for start in range(0, N, BT):
        step = N - 1 - (start + rows).to(tl.int64)  # of the recurrence, from the last one down
        t = N - 1 - step if REVERSE else step
        later = t - 1 if REVERSE else t + 1
        earlier = t + 1 if REVERSE else t - 1
        mask = (step >= 0)[:, None] & is_channel[None, :]  # [BT, BD]
        has_later = mask & (step < N - 1)[:, None]
        has_earlier = mask & (step > 0)[:, None]
        row = ((batch * N + t[:, None]) * D + d[None, :]) * S
        at = a + (batch * a_batch + later[:, None] * a_step + d[None, :]) * S
        before = h + ((batch * N + earlier[:, None]) * D + d[None, :]) * S
        start_state = h0 + (batch * D + d[None, :] + tl.zeros([BT, BD], tl.int64)) * S
        is_first = mask & (step == 0)[:, None]
        x = tl.load(at, mask=has_later, other=1.0).to(tl.float32)
        y = tl.load(dh + row, mask=mask, other=0.0).to(tl.float32)
        p = tl.load(before, mask=has_earlier, other=0.0).to(tl.float32)
        p += tl.load(start_state, mask=is_first, other=0.0).to(tl.float32)
        if COMPLEX:
            x_i = -tl.load(at + 1, mask=has_later, other=0.0).to(tl.float32)
            y_i = tl.load(dh + row + 1, mask=mask, other=0.0).to(tl.float32)
            p_i = tl.load(before + 1, mask=has_earlier, other=0.0).to(tl.float32)
            p_i += tl.load(start_state + 1, mask=is_first, other=0.0).to(tl.float32)
            x, x_i, y, y_i = tl.associative_scan((x, x_i, y, y_i), 0, _then_complex)
            lam = y + x * carry[None, :] - x_i * carry_i[None, :]
            lam_i = y_i + x * carry_i[None, :] + x_i * carry[None, :]
            tl.store(db + row + 1, lam_i, mask=mask)
            product = lam * p + lam_i * p_i
            product_i = lam_i * p - lam * p_i
            if CONSTANT:
                total_i += tl.sum(tl.where(mask, product_i, 0.0), 0)
            else:
                tl.store(da + row + 1, product_i, mask=mask)
            carry_i = tl.sum(tl.where(is_last, lam_i, 0.0), 0)
        else:
            x, y = tl.associative_scan((x, y), 0, _then)
            lam = y + x * carry[None, :]
            product = lam * p
        tl.store(db + row, lam.to(db.dtype.element_ty), mask=mask)
        if CONSTANT:
            total += tl.sum(tl.where(mask, product, 0.0), 0)
        else:
            tl.store(da + row, product.to(da.dtype.element_ty), mask=mask)
        carry = tl.sum(tl.where(is_last, lam, 0.0), 0)
    # The rows behind the end passed lambda_1 on.
    first = N - 1 if REVERSE else 0
    at = a + (batch * a_batch + first * a_step + d) * S
    x = tl.load(at, mask=is_channel, other=0.0).to(tl.float32)
    out = (batch * D + d) * S
    if COMPLEX:
        x_i = -tl.load(at + 1, mask=is_channel, other=0.0).to(tl.float32)
        tl.store(dh0 + out, x * carry - x_i * carry_i, mask=is_channel)
        tl.store(dh0 + out + 1, x * carry_i + x_i * carry, mask=is_channel)
    else:
        tl.store(dh0 + out, (x * carry).to(dh0.dtype.element_ty), mask=is_channel)
    if CONSTANT:
        tl.store(da + out, total.to(da.dtype.element_ty), mask=is_channel)
        if COMPLEX:
            tl.store(da + out + 1, total_i, mask=is_channel)


def refuses(a: Tensor, b: Tensor, h0: Tensor, reverse: bool) -> str | None:
    """Why these arguments need another path."""
    if b.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.complex64):
        return None
    return f"it computes in float32 and complex64, these are {b.dtype}"


def linrec(a: Tensor, b: Tensor, h0: Tensor, reverse: bool) -> Tensor:
    """As `reference.linrec`."""
    return _forward(a, b, h0, reverse)


@torch.library.custom_op("genkit::linrec_triton", mutates_args=())
def _forward(a: Tensor, b: Tensor, h0: Tensor, reverse: bool) -> Tensor:
    a, b, h0 = a.contiguous(), b.contiguous(), h0.contiguous()
    h = torch.empty_like(b)
    B, N, D, *strides = _sizes(a, b)
    blocks = _blocks(b.is_complex(), N, D)
    _forward_kernel[(B, triton.cdiv(D, blocks["BD"]))](
        *map(_floats, (a, b, h0, h)), N, D, *strides, REVERSE=reverse, COMPLEX=b.is_complex(), **blocks, num_warps=4
    )
    return h


@_forward.register_fake
def _(a: Tensor, b: Tensor, h0: Tensor, reverse: bool) -> Tensor:
    return b.new_empty(b.shape)


@torch.library.custom_op("genkit::linrec_triton_backward", mutates_args=())
def _backward(a: Tensor, h: Tensor, h0: Tensor, dh: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    a, h, h0, dh = a.contiguous(), h.contiguous(), h0.contiguous(), dh.contiguous()
    B, N, D, *strides = _sizes(a, h)
    da = a.new_empty(B, a.shape[1], D)
    db, dh0 = torch.empty_like(h), torch.empty_like(h0)
    blocks = _blocks(h.is_complex(), N, D)
    _backward_kernel[(B, triton.cdiv(D, blocks["BD"]))](
        *map(_floats, (a, h, h0, dh, da, db, dh0)), N, D, *strides,
        CONSTANT=a.shape[1] == 1, REVERSE=reverse, COMPLEX=h.is_complex(), **blocks, num_warps=4,
    )  # fmt: skip
    return da if a.shape[0] == B else da.sum(0, keepdim=True), db, dh0


@_backward.register_fake
def _(a: Tensor, h: Tensor, h0: Tensor, dh: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape), h.new_empty(h.shape), h0.new_empty(h0.shape)


def _sizes(a: Tensor, b: Tensor) -> tuple[int, ...]:
    """B, N, D, and the numbers from one batch entry and from one token of a to the next, 0 where a is shared."""
    B, N, D = b.shape
    return B, N, D, a.shape[1] * D if a.shape[0] > 1 else 0, D if a.shape[1] > 1 else 0


def _blocks(is_complex: bool, N: int, D: int) -> dict[str, int]:
    """Tokens and channels per tile; small under the interpreter, which pays per element."""
    if is_interpreting():
        return {"BT": min(16, triton.next_power_of_2(N)), "BD": min(32, triton.next_power_of_2(D))}
    return dict(_COMPLEX_TILE if is_complex else _TILE)


def _floats(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, _, h0, ctx.reverse = inputs
    ctx.save_for_backward(a, output, h0)


def _gradients(ctx: Any, dh: Tensor) -> tuple[Any, ...]:
    return (*_backward(*ctx.saved_tensors, dh, ctx.reverse), None)


_forward.register_autograd(_gradients, setup_context=_save)


def variants() -> list[dict[str, Any]]:
    """What to compile ahead of time: real in float32 and bfloat16, complex, decay per token and shared."""
    found = []
    for kind in ("fp32", "bf16", "complex64"):
        is_complex = kind == "complex64"
        pointer = "*fp32" if is_complex else f"*{kind}"
        sizes = {"N": "i32", "D": "i32", "a_batch": "i32", "a_step": "i32"}
        common = {"REVERSE": False, "COMPLEX": is_complex, **(_COMPLEX_TILE if is_complex else _TILE)}
        forward = dict.fromkeys(("a", "b", "h0", "h"), pointer) | sizes
        found.append(_variant(_forward_kernel, f"linrec_forward_{kind}", forward, common))
        backward = dict.fromkeys(("a", "h", "h0", "dh", "da", "db", "dh0"), pointer) | sizes
        for name, is_constant in (("", False), ("_shared", True)):
            constants = {"CONSTANT": is_constant, **common}
            found.append(_variant(_backward_kernel, f"linrec_backward{name}_{kind}", backward, constants))
    return found


def _variant(kernel: Any, name: str, arguments: dict[str, str], constants: dict[str, Any]) -> dict[str, Any]:
    signature = {key: arguments.get(key, "constexpr") for key in kernel.arg_names}
    return {
        "kernel": kernel,
        "name": name,
        "signature": signature,
        "constexprs": constants,
        "num_warps": 4,
        "num_stages": 2,
    }
