"""Triton kernels of selective_scan.

A program owns BD channels of one group of one batch entry, with all their R states in registers, for one segment of the sequence, step after step.
Where batch and channels alone do not fill the device there is more than one segment, and three passes: each segment from a state of zero, all at
once; the few states between segments, one after another; each segment again from its true state. The decay of a whole segment needs no product:
it is exp(A (d_1 + d_2 + ...)). The backward pass does the same with the gradient of the state from the other end, and computes the states inside
CHUNK steps again from the one kept before them. Sums over channels (for B, C) and over the batch (for A, D_skip, delta_bias) are left as one part
per program and added up afterwards, so that the order never changes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genkit.dispatch import is_interpreting

_CHUNK = 16  # steps between kept states
_TILE = 1024  # states of a program at most: 8 per thread and tile, nothing spilled on sm_80 and sm_90
# Left alone the assembler for sm_90 squeezes half precision into 168 registers and spills.
_BACKWARD_OPTIONS: dict[str, int] = {} if torch.version.hip else {"maxnreg": 192}
_PROGRAMS = 1024  # fewer than this leave a device idle
_LEAST_SEGMENT = 128  # steps
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _softplus(x):
    # max(x, 0) + log1p(y), y = exp(-|x|) in (0, 1]; log1p(y) = 2 artanh(y / (2 + y)) by a polynomial: log(1 + y) would lose small y.
    y = tl.exp2(-tl.abs(x) * _LOG2E)
    s = y / (2.0 + y)
    q = s * s
    p = 0.279606223 + q * 0.281782583
    p = 0.400249086 + q * p
    p = 0.666663147 + q * p
    p = 2.0 + q * p
    return tl.where(x > 0, x, 0.0 * x) + p * s


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * _LOG2E))


@triton.jit
def _place(D, groups, BD: tl.constexpr):
    # -> group, block of channels within all, channels [BD], their mask
    width = D // groups
    per_group = tl.cdiv(width, BD)
    block = tl.program_id(1)
    group = block // per_group
    within = block % per_group * BD + tl.arange(0, BD)
    return group, block, group * width + within, within < width


@triton.jit
def _rate(A, d, is_channel, r, R):
    at = A + d[:, None].to(tl.int64) * R + r[None, :]
    mask = is_channel[:, None] & (r < R)[None, :]
    return tl.load(at, mask=mask, other=0.0).to(tl.float32) * _LOG2E  # [BD, BR]


@triton.jit
def _raw_step(delta, bias, row, d, is_channel, HAS_BIAS: tl.constexpr):
    raw = tl.load(delta + row + d, mask=is_channel, other=0.0).to(tl.float32)  # [BD]
    if HAS_BIAS:
        raw += tl.load(bias + d, mask=is_channel, other=0.0).to(tl.float32)
    return raw


@triton.jit
def _step_size(delta, bias, row, d, is_channel, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr):
    step = _raw_step(delta, bias, row, d, is_channel, HAS_BIAS)
    if SOFTPLUS:
        step = _softplus(step)
    return step


@triton.jit
def _forward_kernel(
    u, delta, A, B, C, skip, z, bias, states, out, kept, last, total, N, D, groups, R, length,
    HAS_SKIP: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    SUMMARY: tl.constexpr, KEEP: tl.constexpr, CHUNK: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    # SUMMARY: from a state of zero, only the last state and the sum of step sizes [batch, segments, D] come out.
    batch = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(2)
    segments = tl.num_programs(2)
    group, _, d, is_channel = _place(D, groups, BD)
    r = tl.arange(0, BR)
    a = _rate(A, d, is_channel, r, R)
    own = (batch * segments + segment) * D * R
    tile = d[:, None].to(tl.int64) * R + r[None, :]
    mask = is_channel[:, None] & (r < R)[None, :]  # [BD, BR]
    if SUMMARY:
        h = tl.zeros([BD, BR], tl.float32)
        sum_d = tl.zeros([BD], tl.float32)
    else:
        h = tl.load(states + own + tile, mask=mask, other=0.0).to(tl.float32)
    begin = segment * length
    end = tl.minimum(begin + length, N)
    chunks = tl.cdiv(N, CHUNK)
    for start in range(begin, end, CHUNK):
        if KEEP:
            tl.store(kept + ((batch * chunks + start // CHUNK) * D) * R + tile, h, mask=mask)
        for step in range(start, tl.minimum(start + CHUNK, end)):
            t = N - 1 - step if REVERSE else step
            row = (batch * N + t) * D
            map_row = ((batch * N + t) * groups + group) * R
            dt = _step_size(delta, bias, row, d, is_channel, HAS_BIAS, SOFTPLUS)
            ut = tl.load(u + row + d, mask=is_channel, other=0.0).to(tl.float32)
            bt = tl.load(B + map_row + r, mask=r < R, other=0.0).to(tl.float32)  # [BR]
            h = tl.exp2(dt[:, None] * a) * h + (dt * ut)[:, None] * bt[None, :]
            if SUMMARY:
                sum_d += dt
            else:
                ct = tl.load(C + map_row + r, mask=r < R, other=0.0).to(tl.float32)
                y = tl.sum(h * ct[None, :], 1)  # [BD]
                if HAS_SKIP:
                    y += tl.load(skip + d, mask=is_channel, other=0.0).to(tl.float32) * ut
                if HAS_Z:
                    gate = tl.load(z + row + d, mask=is_channel, other=0.0).to(tl.float32)
                    y *= gate * _sigmoid(gate)
                tl.store(out + row + d, y.to(out.dtype.element_ty), mask=is_channel)
    tl.store(last + own + tile, h, mask=mask)
    if SUMMARY:
        tl.store(total + (batch * segments + segment) * D + d, sum_d, mask=is_channel)


@triton.jit
def _join_kernel(A, first, ends, total, states, final, D, R, segments, BACKWARD: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    # The state before every segment [batch, segments, D, R] from the one before the first and what each segment adds; BACKWARD runs from the last.
    batch = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    r = tl.arange(0, BR)
    is_channel = d < D
    a = _rate(A, d, is_channel, r, R)
    tile = d[:, None].to(tl.int64) * R + r[None, :]
    mask = is_channel[:, None] & (r < R)[None, :]
    h = tl.load(first + batch * D * R + tile, mask=mask, other=0.0).to(tl.float32)
    for i in range(segments):
        segment = batch * segments + (segments - 1 - i if BACKWARD else i)
        tl.store(states + segment * D * R + tile, h, mask=mask)
        decay = tl.exp2(tl.load(total + segment * D + d, mask=is_channel, other=0.0)[:, None] * a)
        h = decay * h + tl.load(ends + segment * D * R + tile, mask=mask, other=0.0)
    tl.store(final + batch * D * R + tile, h, mask=mask)


@triton.jit
def _carry_kernel(
    delta, A, C, z, bias, dout, ends, total, N, D, groups, R, length,
    HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    # What a segment adds to the gradient of the state before it, when the one behind it is zero.
    batch = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(2)
    segments = tl.num_programs(2)
    group, _, d, is_channel = _place(D, groups, BD)
    r = tl.arange(0, BR)
    a = _rate(A, d, is_channel, r, R)
    carry = tl.zeros([BD, BR], tl.float32)
    sum_d = tl.zeros([BD], tl.float32)
    begin = segment * length
    end = tl.minimum(begin + length, N)
    for i in range(end - begin):
        step = end - 1 - i
        t = N - 1 - step if REVERSE else step
        row = (batch * N + t) * D
        map_row = ((batch * N + t) * groups + group) * R
        dt = _step_size(delta, bias, row, d, is_channel, HAS_BIAS, SOFTPLUS)
        dy = tl.load(dout + row + d, mask=is_channel, other=0.0).to(tl.float32)
        if HAS_Z:
            gate = tl.load(z + row + d, mask=is_channel, other=0.0).to(tl.float32)
            dy *= gate * _sigmoid(gate)
        ct = tl.load(C + map_row + r, mask=r < R, other=0.0).to(tl.float32)
        carry = tl.exp2(dt[:, None] * a) * (carry + dy[:, None] * ct[None, :])
        sum_d += dt
    mask = is_channel[:, None] & (r < R)[None, :]
    tile = d[:, None].to(tl.int64) * R + r[None, :]
    tl.store(ends + (batch * segments + segment) * D * R + tile, carry, mask=mask)
    tl.store(total + (batch * segments + segment) * D + d, sum_d, mask=is_channel)


@triton.jit
def _backward_kernel(
    u, delta, A, B, C, skip, z, bias, kept, dout, carries, scratch, du, ddelta, dA, dB, dC, dskip, dz, dbias, dfirst,
    N, D, groups, R, length,
    HAS_SKIP: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    CHUNK: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    # scratch [programs, CHUNK, BD, BR]: the states before the steps of the chunk at hand.
    batch = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(2)
    segments = tl.num_programs(2)
    blocks = tl.num_programs(1)
    group, block, d, is_channel = _place(D, groups, BD)
    r = tl.arange(0, BR)
    a = _rate(A, d, is_channel, r, R)
    own = (batch * segments + segment) * D
    tile = d[:, None].to(tl.int64) * R + r[None, :]
    mask = is_channel[:, None] & (r < R)[None, :]
    inner = tl.arange(0, BD)[:, None] * BR + r[None, :]
    mine = scratch + ((batch * segments + segment) * blocks + block) * CHUNK * BD * BR + inner
    carry = tl.load(carries + own * R + tile, mask=mask, other=0.0).to(tl.float32)
    sum_a = tl.zeros([BD, BR], tl.float32)
    sum_skip = tl.zeros([BD], tl.float32)
    sum_bias = tl.zeros([BD], tl.float32)
    if HAS_SKIP:
        skipped = tl.load(skip + d, mask=is_channel, other=0.0).to(tl.float32)
    begin = segment * length
    end = tl.minimum(begin + length, N)
    chunks = tl.cdiv(N, CHUNK)
    count = tl.cdiv(end - begin, CHUNK)
    for i in range(count):
        start = begin + (count - 1 - i) * CHUNK
        stop = tl.minimum(start + CHUNK, end)
        h = tl.load(kept + ((batch * chunks + start // CHUNK) * D) * R + tile, mask=mask, other=0.0)
        tl.debug_barrier()  # the chunk before has been read
        for step in range(start, stop):
            tl.store(mine + (step - start) * BD * BR, h)
            t = N - 1 - step if REVERSE else step
            row = (batch * N + t) * D
            dt = _step_size(delta, bias, row, d, is_channel, HAS_BIAS, SOFTPLUS)
            ut = tl.load(u + row + d, mask=is_channel, other=0.0).to(tl.float32)
            bt = tl.load(B + ((batch * N + t) * groups + group) * R + r, mask=r < R, other=0.0).to(tl.float32)
            h = tl.exp2(dt[:, None] * a) * h + (dt * ut)[:, None] * bt[None, :]
        tl.debug_barrier()  # the chunk has been written
        for j in range(stop - start):
            step = stop - 1 - j
            t = N - 1 - step if REVERSE else step
            row = (batch * N + t) * D
            map_row = ((batch * N + t) * groups + group) * R
            raw = _raw_step(delta, bias, row, d, is_channel, HAS_BIAS)
            dt = _softplus(raw) if SOFTPLUS else raw
            ut = tl.load(u + row + d, mask=is_channel, other=0.0).to(tl.float32)
            bt = tl.load(B + map_row + r, mask=r < R, other=0.0).to(tl.float32)
            ct = tl.load(C + map_row + r, mask=r < R, other=0.0).to(tl.float32)
            given = tl.load(dout + row + d, mask=is_channel, other=0.0).to(tl.float32)
            decay = tl.exp2(dt[:, None] * a)
            decayed = decay * tl.load(mine + (step - start) * BD * BR)
            h = decayed + (dt * ut)[:, None] * bt[None, :]
            dy = given
            if HAS_Z:
                gate = tl.load(z + row + d, mask=is_channel, other=0.0).to(tl.float32)
                open = _sigmoid(gate)
                dy = given * gate * open
                y = tl.sum(h * ct[None, :], 1)
                if HAS_SKIP:
                    y += skipped * ut
                gated = given * y * open * (1.0 + gate * (1.0 - open))
                tl.store(dz + row + d, gated.to(dz.dtype.element_ty), mask=is_channel)
            g = carry + dy[:, None] * ct[None, :]
            w = g * decayed
            sum_a += w * dt[:, None]
            by_b = tl.sum(g * bt[None, :], 1)  # [BD]
            grad_d = ut * by_b + tl.sum(w * a, 1) * _LN2
            if SOFTPLUS:
                grad_d *= _sigmoid(raw)
            sum_bias += grad_d
            grad_u = dt * by_b
            if HAS_SKIP:
                grad_u += skipped * dy
                sum_skip += dy * ut
            tl.store(ddelta + row + d, grad_d.to(ddelta.dtype.element_ty), mask=is_channel)
            tl.store(du + row + d, grad_u.to(du.dtype.element_ty), mask=is_channel)
            part = (((batch * (blocks // groups) + block % (blocks // groups)) * N + t) * groups + group) * R + r
            tl.store(dB + part, tl.sum(g * (dt * ut)[:, None], 0), mask=r < R)
            tl.store(dC + part, tl.sum(h * dy[:, None], 0), mask=r < R)
            carry = decay * g
    tl.store(dA + own * R + tile, sum_a, mask=mask)
    if HAS_SKIP:
        tl.store(dskip + own + d, sum_skip, mask=is_channel)
    if HAS_BIAS:
        tl.store(dbias + own + d, sum_bias, mask=is_channel)
    if segment == 0:
        tl.store(dfirst + batch * D * R + tile, carry, mask=mask)


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
    """As `reference.selective_scan`; inputs of half precision are read as they are."""
    given = (u, delta, A, B, C, D_skip, z, delta_bias, initial_state)
    will_differentiate = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    out, last, _ = _forward(*given, delta_softplus, reverse, will_differentiate)
    return out, last


@torch.library.custom_op("genkit::selective_scan_triton", mutates_args=())
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
    """y, the last state, and with `keep` the state before every _CHUNK steps, [batch, chunks, D, R]; else an empty tensor."""
    u, delta, A, B, C, skip, gate, bias = _solid(u, delta, A, B, C, D_skip, z, delta_bias)
    batch, N, D, groups, R = sizes = (*u.shape, *B.shape[2:])
    blocks, length = _blocks(*sizes)
    segments = triton.cdiv(N, length)
    out, last, kept = _outputs(u, B, initial_state, keep)
    grid = (batch, groups * triton.cdiv(D // groups, blocks["BD"]), segments)
    flags = {"HAS_BIAS": bias is not None, "SOFTPLUS": delta_softplus, "REVERSE": reverse, "CHUNK": _CHUNK, **blocks}
    flags |= {"HAS_SKIP": skip is not None, "HAS_Z": gate is not None, "num_warps": 4}
    # What is None is never read; the kernels take u in its place.
    inputs = [u if x is None else x for x in (u, delta, A, B, C, skip, gate, bias)]
    states = initial_state.float().contiguous()
    ends = last if segments == 1 else u.new_empty(batch, segments, D, R, dtype=torch.float32)
    total = u.new_empty(batch, segments, D, dtype=torch.float32)
    with _device_of(u):
        if segments > 1:
            _forward_kernel[grid](
                *inputs, states, out, kept, ends, total, N, D, groups, R, length, SUMMARY=True, KEEP=False, **flags
            )
            first, states = states, torch.empty_like(ends)
            _join(A, first, ends, total, states, last, blocks, is_backward=False)
        _forward_kernel[grid](
            *inputs, states, out, kept, ends, total, N, D, groups, R, length, SUMMARY=False, KEEP=keep, **flags
        )
    return out, last, kept


def _outputs(u: Tensor, B: Tensor, initial_state: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    (batch, N, D), R = u.shape, B.shape[3]
    kept = (batch, triton.cdiv(N, _CHUNK), D, R) if keep else (0,)
    single: dict[str, Any] = {"dtype": torch.float32}
    return u.new_empty(u.shape), u.new_empty(batch, D, R, **single), u.new_empty(kept, **single)


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
    return _outputs(u, B, initial_state, keep)


@torch.library.custom_op("genkit::selective_scan_triton_backward", mutates_args=())
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
    u, delta, A, B, C, skip, gate, bias, dout = _solid(u, delta, A, B, C, D_skip, z, delta_bias, dout)
    batch, N, D, groups, R = sizes = (*u.shape, *B.shape[2:])
    blocks, length = _blocks(*sizes)
    segments, per_group = triton.cdiv(N, length), triton.cdiv(D // groups, blocks["BD"])
    grid = (batch, groups * per_group, segments)
    single: dict[str, Any] = {"dtype": torch.float32, "device": u.device}
    du, ddelta, dz = torch.empty_like(u), torch.empty_like(u), torch.empty_like(u if gate is not None else u[:0])
    dB, dC = (torch.empty(batch, per_group, N, groups, R, **single) for _ in range(2))
    dA = torch.empty(batch, segments, D, R, **single)
    dskip, dbias = (torch.empty(batch, segments, D, **single) for _ in range(2))
    dfirst = torch.empty(batch, D, R, **single)
    carries = torch.zeros(batch, D, R, **single) if dlast is None else dlast.float().contiguous()
    scratch = torch.empty(*grid, _CHUNK, blocks["BD"], blocks["BR"], **single)
    flags = {"HAS_BIAS": bias is not None, "SOFTPLUS": delta_softplus, "REVERSE": reverse, **blocks}
    flags |= {"HAS_Z": gate is not None, "num_warps": 4}
    inputs = [u if x is None else x for x in (u, delta, A, B, C, skip, gate, bias)]
    with _device_of(u):
        if segments > 1:
            ends, total = torch.empty_like(dA), torch.empty_like(dbias)
            _carry_kernel[grid](
                delta, A, C, *inputs[6:], dout, ends, total, N, D, groups, R, length, **flags
            )  # fmt: skip
            behind, carries = carries, torch.empty_like(ends)
            _join(A, behind, ends, total, carries, dfirst, blocks, is_backward=True)
        _backward_kernel[grid](
            *inputs, kept, dout, carries, scratch, du, ddelta, dA, dB, dC, dskip, dz, dbias, dfirst,
            N, D, groups, R, length, HAS_SKIP=skip is not None, CHUNK=_CHUNK, **flags, **_BACKWARD_OPTIONS,
        )  # fmt: skip
    return [
        du,
        ddelta,
        dA.sum((0, 1)).to(A),
        dB.sum(1).to(B),
        dC.sum(1).to(C),
        u.new_empty(0) if D_skip is None else dskip.sum((0, 1)).to(D_skip),
        u.new_empty(0) if z is None else dz,
        u.new_empty(0) if delta_bias is None else dbias.sum((0, 1)).to(delta_bias),
        dfirst.to(initial_state.dtype),
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
    return [u.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs]


def _join(
    A: Tensor, first: Tensor, ends: Tensor, total: Tensor, states: Tensor, final: Tensor, blocks: dict[str, int], *, is_backward: bool
) -> None:  # fmt: skip
    batch, segments, D, R = ends.shape
    grid = (batch, triton.cdiv(D, blocks["BD"]))
    _join_kernel[grid](
        A, first, ends, total, states, final, D, R, segments, BACKWARD=is_backward, **blocks, num_warps=4
    )


def _blocks(batch: int, N: int, D: int, groups: int, R: int) -> tuple[dict[str, int], int]:
    """Channels and states of a tile, and steps of a segment: whole chunks, and so few that the device is full."""
    BR = max(2, triton.next_power_of_2(R))
    BD = max(1, min(64, _TILE // BR, triton.next_power_of_2(D // groups)))
    programs = batch * groups * triton.cdiv(D // groups, BD)
    wanted = max(1, min(_PROGRAMS // programs, N // _LEAST_SEGMENT))
    if is_interpreting():
        wanted = 2  # both kinds of passes, whatever the size
    length = triton.cdiv(triton.cdiv(N, wanted), _CHUNK) * _CHUNK
    return {"BD": BD, "BR": BR}, length


def _solid(*given: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in given]


def _device_of(x: Tensor) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device_of(x)


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


def variants() -> list[dict[str, Any]]:
    """What to compile ahead of time: gated, with softplus, bias and skip, as in Mamba, for 16 and 64 states."""
    found = []
    for kind in ("fp32", "bf16"):
        for states in (16, 64):
            blocks = {"BD": min(64, _TILE // states), "BR": states}
            flags = {"HAS_SKIP": True, "HAS_Z": True, "HAS_BIAS": True, "SOFTPLUS": True, "REVERSE": False, **blocks}
            kept = {"CHUNK": _CHUNK, "KEEP": True}
            for name, kernel, more in (
                ("forward", _forward_kernel, {"SUMMARY": False, **kept}),
                ("summary", _forward_kernel, {"SUMMARY": True, **kept, "KEEP": False}),
                ("join", _join_kernel, {"BACKWARD": False}),
                ("carry", _carry_kernel, {}),
                ("backward", _backward_kernel, {"CHUNK": _CHUNK}),
            ):
                constants = {key: value for key, value in {**flags, **more}.items() if key in kernel.arg_names}
                signature = {key: "constexpr" if key in constants else _type(key, kind) for key in kernel.arg_names}
                found.append(
                    {
                        "kernel": kernel,
                        "name": f"selective_scan_{name}_{states}_{kind}",
                        "signature": signature,
                        "constexprs": constants,
                        "num_warps": 4,
                        "num_stages": 2,
                        **(_BACKWARD_OPTIONS if name == "backward" else {}),
                    }
                )
    return found


def _type(argument: str, kind: str) -> str:
    if argument in ("N", "D", "groups", "R", "length", "segments"):
        return "i32"
    return f"*{kind}" if argument in ("u", "delta", "B", "C", "z", "out", "dout", "du", "ddelta", "dz") else "*fp32"
