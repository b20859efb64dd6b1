"""Triton kernels of aaren: a program owns one head and walks over the tokens in chunks, carrying the largest score, the sum and o; within a chunk the prefix
softmax is a masked product, with the largest score and the sum from a parallel scan."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genkit.dispatch import is_interpreting


@triton.jit
def _exp_difference(x, y):
    """exp(x - y) for x <= y, at most 1 elsewhere; 0 where x is -inf, also when both are."""
    difference = x - tl.where(y == float("-inf"), 0.0, y)
    return tl.where(x == float("-inf"), 0.0, tl.exp(tl.where(difference > 0.0, 0.0, difference)))


@triton.jit
def _then(m1, u1, m2, u2):
    m = tl.maximum(m1, m2)
    return m, u1 * _exp_difference(m1, m) + u2 * _exp_difference(m2, m)


@triton.jit
def _inverse(u):
    return tl.where(u > 0.0, 1.0 / tl.where(u > 0.0, u, 1.0), 0.0 * u)


@triton.jit
def _forward_kernel(
    scores, v, log0, mean0, o, largest, total, N, H, V,
    REVERSE: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    rows, c = tl.arange(0, BT), tl.arange(0, BV)  # [BT], [BV]
    is_channel = c < V
    m = tl.load(log0 + batch * H + head)
    u = tl.where(m == float("-inf"), 0.0, 1.0)
    mean = tl.load(mean0 + (batch * H + head) * V + c, mask=is_channel, other=0.0).to(tl.float32)  # [BV]
    for start in range(0, N, BT):
        step = (start + rows).to(tl.int64)
        t = N - 1 - step if REVERSE else step
        is_token = step < N
        at = (batch * N + t) * H + head  # [BT]
        mask = is_token[:, None] & is_channel[None, :]  # [BT, BV]
        s = tl.load(scores + at, mask=is_token, other=float("-inf")).to(tl.float32)
        x = tl.load(v + at[:, None] * V + c[None, :], mask=mask, other=0.0).to(tl.float32)
        inside, sums = tl.associative_scan((s, tl.where(s == float("-inf"), 0.0, 1.0)), 0, _then)  # [BT] of this chunk
        top = tl.maximum(inside, m)
        before = u * _exp_difference(m, top)
        sums = sums * _exp_difference(inside, top) + before
        share = _inverse(sums)
        pairs = _exp_difference(s[None, :], top[:, None]) * share[:, None]  # [BT, BT]
        pairs = tl.where(rows[:, None] >= rows[None, :], pairs, 0.0)
        y = tl.dot(pairs, x, input_precision="ieee") + (before * share)[:, None] * mean[None, :]
        tl.store(o + at[:, None] * V + c[None, :], y.to(o.dtype.element_ty), mask=mask)
        tl.store(largest + at, top, mask=is_token)
        tl.store(total + at, sums, mask=is_token)
        # Rows behind the end are -inf and change nothing.
        is_last = rows == BT - 1
        mean = tl.sum(tl.where(is_last[:, None], y, 0.0), 0)
        m = tl.max(tl.where(is_last, top, float("-inf")), 0)
        u = tl.sum(tl.where(is_last, sums, 0.0), 0)


@triton.jit
def _backward_kernel(
    scores, v, log0, mean0, o, largest, total, d_o, dtotal, ds, dv, dlog0, dmean0, N, H, V,
    REVERSE: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    # With p_tj = exp(s_j - L_t): dv_j = sum_{t>=j} p_tj do_t and ds_j = dv_j.v_j - sum_{t>=j} p_tj delta_t, where delta_t = do_t.o_t - dL_t.
    # Of the chunks behind, `carry` and `rest` hold sum_t exp(L_last - L_t) do_t and the same of delta, L_last at this chunk's last token.
    batch = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    rows, c = tl.arange(0, BT), tl.arange(0, BV)
    is_channel = c < V
    start_log = tl.load(log0 + batch * H + head)
    carry = tl.zeros([BV], tl.float32)
    rest = tl.sum(tl.zeros([BT], tl.float32), 0)
    for back in range(0, N, BT):
        start = (N - 1 - back) // BT * BT
        step = (start + rows).to(tl.int64)
        t = N - 1 - step if REVERSE else step
        is_token = step < N
        at = (batch * N + t) * H + head
        mask = is_token[:, None] & is_channel[None, :]
        s = tl.load(scores + at, mask=is_token, other=float("-inf")).to(tl.float32)
        top = tl.load(largest + at, mask=is_token, other=float("inf"))  # rows behind the end: exp(. - inf) = 0
        sums = tl.load(total + at, mask=is_token, other=1.0)
        share = _inverse(sums)
        x = tl.load(v + at[:, None] * V + c[None, :], mask=mask, other=0.0).to(tl.float32)
        given = tl.load(d_o + at[:, None] * V + c[None, :], mask=mask, other=0.0).to(tl.float32)
        y = tl.load(o + at[:, None] * V + c[None, :], mask=mask, other=0.0).to(tl.float32)
        delta = tl.sum(given * y, 1) - tl.load(dtotal + at, mask=is_token, other=0.0) * sums
        last = tl.minimum(start + BT, N) - 1
        at_last = (batch * N + (N - 1 - last if REVERSE else last)) * H + head
        last_top = tl.load(largest + at_last)
        last_share = _inverse(tl.load(total + at_last))
        pairs = _exp_difference(s[:, None], top[None, :]) * share[None, :]  # [BT of j, BT of t]
        pairs = tl.where(rows[:, None] <= rows[None, :], pairs, 0.0)
        to_last = _exp_difference(s, last_top) * last_share
        dx = tl.dot(pairs, given, input_precision="ieee") + to_last[:, None] * carry[None, :]
        dscore = tl.sum(dx * x, 1) - tl.sum(pairs * delta[None, :], 1) - to_last * rest
        tl.store(dv + at[:, None] * V + c[None, :], dx.to(dv.dtype.element_ty), mask=mask)
        tl.store(ds + at, dscore.to(ds.dtype.element_ty), mask=is_token)
        first = start - 1
        at_first = (batch * N + (N - 1 - first if REVERSE else first)) * H + head
        m = tl.where(start > 0, tl.load(largest + at_first, mask=start > 0, other=0.0), start_log)
        u = tl.where(start > 0, tl.load(total + at_first, mask=start > 0, other=0.0), 1.0)
        weight = u * _exp_difference(m, top) * share  # [BT]
        over = u * _exp_difference(m, last_top) * last_share
        carry = tl.sum(weight[:, None] * given, 0) + over * carry
        rest = tl.sum(weight * delta, 0) + over * rest
    out = batch * H + head
    mean = tl.load(mean0 + out * V + c, mask=is_channel, other=0.0).to(tl.float32)
    tl.store(dmean0 + out * V + c, carry.to(dmean0.dtype.element_ty), mask=is_channel)
    tl.store(dlog0 + out, tl.sum(carry * mean, 0) - rest)


_MOST_CHANNELS = 128  # the state of a head stays in registers


def refuses(scores: Tensor, v: Tensor, log_denominator: Tensor, mean: Tensor, reverse: bool) -> str | None:
    """Why these arguments need another path."""
    if v.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes in float32, these are {v.dtype}"
    return (
        None
        if v.shape[3] <= _MOST_CHANNELS
        else f"it takes at most {_MOST_CHANNELS} channels per head, v has {v.shape[3]}"
    )


def aaren(scores: Tensor, v: Tensor, log_denominator: Tensor, mean: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """As `reference.aaren`."""
    o, largest, total = _forward(scores, v, log_denominator, mean, reverse)
    last = 0 if reverse else -1
    m, u = largest[:, last], total[:, last]
    return o, torch.where(u > 0, m + torch.where(u > 0, u, 1).log(), m)


@torch.library.custom_op("genkit::aaren_triton", mutates_args=())
def _forward(
    scores: Tensor, v: Tensor, log_denominator: Tensor, mean: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    scores, v, log_denominator, mean = (x.contiguous() for x in (scores, v, log_denominator, mean))
    o, largest, total = torch.empty_like(v), *(torch.empty_like(scores, dtype=torch.float32) for _ in range(2))
    B, N, H, V = v.shape
    _forward_kernel[(B, H)](
        scores, v, log_denominator, mean, o, largest, total, N, H, V, REVERSE=reverse, **_blocks(V), num_warps=_warps(V)
    )
    return o, largest, total


@_forward.register_fake
def _(scores: Tensor, v: Tensor, log_denominator: Tensor, mean: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    largest, total = (scores.new_empty(scores.shape, dtype=torch.float32) for _ in range(2))
    return v.new_empty(v.shape), largest, total


@torch.library.custom_op("genkit::aaren_triton_backward", mutates_args=())
def _backward(
    scores: Tensor, v: Tensor, log_denominator: Tensor, mean: Tensor, o: Tensor, largest: Tensor, total: Tensor,
    do: Tensor, dtotal: Tensor, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = [x.contiguous() for x in (scores, v, log_denominator, mean, o, largest, total, do, dtotal)]
    ds, dv, dlog, dmean = (torch.empty_like(x) for x in inputs[:4])
    B, N, H, V = v.shape
    _backward_kernel[(B, H)](*inputs, ds, dv, dlog, dmean, N, H, V, REVERSE=reverse, **_blocks(V), num_warps=_warps(V))
    return ds, dv, dlog, dmean


@_backward.register_fake
def _(
    scores: Tensor, v: Tensor, log_denominator: Tensor, mean: Tensor, o: Tensor, largest: Tensor, total: Tensor,
    do: Tensor, dtotal: Tensor, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    ds, dv, dlog, dmean = (x.new_empty(x.shape) for x in (scores, v, log_denominator, mean))
    return ds, dv, dlog, dmean


def _blocks(V: int) -> dict[str, int]:
    """Tokens and channels per tile; with more tokens or fewer warps the backward of 128 channels spills."""
    return {"BT": 16 if is_interpreting() or V > 64 else 32, "BV": max(16, triton.next_power_of_2(V))}


def _warps(V: int) -> int:
    return 8 if V > 64 else 4


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.reverse = inputs
    ctx.mark_non_differentiable(output[1])  # the largest score cancels
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx: Any, do: Tensor, _largest: Tensor, dtotal: Tensor) -> tuple[Any, ...]:
    return (*_backward(*ctx.saved_tensors, do, dtotal, ctx.reverse), None)


_forward.register_autograd(_gradients, setup_context=_save)


def variants() -> list[dict[str, Any]]:
    """What to compile ahead of time: heads of 64 and 128 channels in float32 and bfloat16."""
    found = []
    for dtype in ("fp32", "bf16"):
        for V in (64, 128):
            for name, kernel in (("forward", _forward_kernel), ("backward", _backward_kernel)):
                constants = {"REVERSE": False, **_blocks(V)}
                wide = dict.fromkeys(("log0", "largest", "total", "dtotal", "dlog0"), "*fp32")
                sizes = dict.fromkeys(("N", "H", "V"), "i32")
                constexprs = dict.fromkeys(constants, "constexpr")
                signature = {key: (wide | sizes | constexprs).get(key, f"*{dtype}") for key in kernel.arg_names}
                found.append(
                    {"kernel": kernel, "name": f"aaren_{name}_{dtype}_V{V}", "signature": signature, "constexprs": constants,
                     "num_warps": _warps(V), "num_stages": 2}
                )  # fmt: skip
    return found
