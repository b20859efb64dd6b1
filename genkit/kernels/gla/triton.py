"""Triton kernel of gla, in chunks of 16 tokens. Forward and backward are one sweep with other roles (as in genkit/kernels/linear_attention.h): a program owns
a block of columns of one head's state S [R, C], keeps it in registers and walks over the chunks,

    out = reach x S + (weights) z,   S = through S + (write y)^T z         x, y [16, R], z, out [16, C]

    o     forward in time    x = q,  y = k,  z = v    decay on rows        dv   backward in time   x = k,  y = q,  z = do   decay on rows
    dq    forward in time    x = do, y = v,  z = k    decay on columns     dk   backward in time   x = v,  y = do, z = q    decay on columns

with G the sum of log decays since the chunk's start: forward in time a row reads through exp(G) and writes through exp(G_last - G), backward the other way
round. Between tokens of a chunk each channel decays on its own, by exp of one difference: no factor exceeds 1."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genkit.dispatch import is_interpreting

_EVERY = 64  # tokens between the states that anchor the gradient of the gates
_MOST = 128  # channels: the state of a program stays in registers
_MOST_SINGLE = 64  # in float32, whose products run without tensor cores from whole rows in registers


@triton.jit
def _sweep_kernel(
    x, y, z, g, first, out, last, kept, N, H, R, C, num_kept, scale,
    ON_ROWS: tl.constexpr, BACK: tl.constexpr, REVERSE: tl.constexpr, EVERY: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)  # of all batch entries
    base = (head // H) * N * H + head % H  # token t lies in row base + t H
    r, c = tl.arange(0, BR), tl.program_id(0) * BC + tl.arange(0, BC)
    rows = tl.arange(0, BT)
    is_r, is_c = r < R, c < C
    # In memory a state is [K, V]: rows first, or columns first where columns are the keys.
    place = r[:, None] * C + c[None, :] if ON_ROWS else c[None, :] * R + r[:, None]  # [BR, BC]
    is_place = is_r[:, None] & is_c[None, :]
    S = tl.load(first + head * R * C + place, mask=is_place, other=0.0).to(tl.float32)
    for walked in range(0, N, BT):
        start = (N - 1) // BT * BT - walked if BACK else walked
        if EVERY > 0:
            # The state at the boundary that this chunk is entered through: its start, or backward in time its end.
            end = tl.minimum(start + BT, N)
            if BACK:
                if (end % EVERY == 0) | (end == N):
                    tl.store(kept + (head * num_kept + (end + EVERY - 1) // EVERY) * R * C + place, S, mask=is_place)
            else:
                if start % EVERY == 0:
                    tl.store(kept + (head * num_kept + start // EVERY) * R * C + place, S, mask=is_place)
        step = (start + rows).to(tl.int64)
        token = base + (N - 1 - step if REVERSE else step) * H  # [BT]
        is_token = (step < N)[:, None]
        xs = tl.load(x + token[:, None] * R + r[None, :], mask=is_token & is_r[None, :], other=0.0).to(tl.float32)
        ys = tl.load(y + token[:, None] * R + r[None, :], mask=is_token & is_r[None, :], other=0.0).to(tl.float32)
        zs = tl.load(z + token[:, None] * C + c[None, :], mask=is_token & is_c[None, :], other=0.0).to(tl.float32)
        if BACK:
            ys *= scale
        else:
            xs *= scale
        # exp(-60) is below what rounds; the difference of two sums that hold -inf is no number.
        if ON_ROWS:
            gs = tl.load(g + token[:, None] * R + r[None, :], mask=is_token & is_r[None, :], other=0.0).to(tl.float32)
        else:
            gs = tl.load(g + token[:, None] * C + c[None, :], mask=is_token & is_c[None, :], other=0.0).to(tl.float32)
        gs = tl.maximum(gs, -60.0)
        G = tl.cumsum(gs, 0)  # [BT, BR or BC]
        total = tl.sum(gs, 0)  # [BR or BC]
        to_end = tl.exp(tl.minimum(total[None, :] - G, 0.0))
        from_start = tl.exp(G)
        reach = to_end if BACK else from_start
        write = from_start if BACK else to_end
        if ON_ROWS:
            o = tl.dot(xs * reach, S, input_precision=PRECISION)  # [BT, BC]
            weights = tl.zeros([BT, BT], tl.float32)
            sofar = tl.zeros([BR], tl.float32)
        else:
            o = tl.dot(xs, S, input_precision=PRECISION) * reach
            weights = tl.dot(xs, tl.trans(ys), input_precision=PRECISION)  # [BT, BT]
            sofar = tl.zeros([BC], tl.float32)
        for s in range(0, BT):  # the token that the others read
            at = base + (N - 1 - (start + s) if REVERSE else start + s) * tl.cast(H, tl.int64)
            is_here = start + s < N
            if ON_ROWS:
                gate = tl.load(g + at * R + r, mask=is_r & is_here, other=0.0).to(tl.float32)
            else:
                gate = tl.load(g + at * C + c, mask=is_c & is_here, other=0.0).to(tl.float32)
            sofar += tl.maximum(gate, -60.0)
            passed = sofar[None, :] - G if BACK else G - sofar[None, :]
            sees = (rows <= s if BACK else rows >= s)[:, None]
            decay = tl.exp(tl.where(sees, tl.minimum(passed, 0.0), float("-inf")))
            is_s = (rows == s)[None, :]
            if ON_ROWS:
                other = tl.load(y + at * R + r, mask=is_r & is_here, other=0.0).to(tl.float32)  # [BR]
                if BACK:
                    other *= scale
                weights = tl.where(is_s, tl.sum(xs * other[None, :] * decay, 1)[:, None], weights)
            else:
                other = tl.load(z + at * C + c, mask=is_c & is_here, other=0.0).to(tl.float32)  # [BC]
                o += tl.sum(tl.where(is_s, weights, 0.0), 1)[:, None] * other[None, :] * decay
        if ON_ROWS:
            o += tl.dot(weights, zs, input_precision=PRECISION)
            S = S * tl.exp(total)[:, None] + tl.dot(tl.trans(ys * write), zs, input_precision=PRECISION)
        else:
            S = S * tl.exp(total)[None, :] + tl.dot(tl.trans(ys), zs * write, input_precision=PRECISION)
        tl.store(out + token[:, None] * C + c[None, :], o.to(out.dtype.element_ty), mask=is_token & is_c[None, :])
    tl.store(last + head * R * C + place, S, mask=is_place)
    if EVERY > 0:
        if not BACK:
            tl.store(kept + (head * num_kept + num_kept - 1) * R * C + place, S, mask=is_place)


def refuses(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor, scale: float, reverse: bool
) -> str | None:
    """Why these arguments need another path."""
    if v.dtype == torch.float64:
        return f"it computes in float32, these are {v.dtype}"
    widest, most = max(q.shape[3], v.shape[3]), _MOST_SINGLE if v.dtype == torch.float32 else _MOST
    return None if widest <= most else f"in {v.dtype} it takes at most {most} channels per head, these have {widest}"


def gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor, scale: float, reverse: bool
) -> tuple[Tensor, Tensor]:
    """As `reference.gla`."""
    return _forward(q, k, v, g, initial_state, scale, reverse)


def _sweep(
    x: Tensor, y: Tensor, z: Tensor, g: Tensor, first: Tensor, scale: float, reverse: bool,
    *, dtype: torch.dtype = torch.float32, on_rows: bool, back: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out [B, N, H, C], the state at the other end, and where columns decay the states every _EVERY tokens, [B, H, n + 1, K, V]."""
    B, N, H, R = x.shape
    C = z.shape[3]
    out, last = torch.empty_like(z, dtype=dtype), torch.empty_like(first)
    every = 0 if on_rows else _EVERY
    num_kept = 0 if on_rows else triton.cdiv(N, _EVERY) + 1
    kept = first.new_zeros(B, H, num_kept, *first.shape[2:])
    blocks, num_warps = _blocks(R, C, x.dtype, on_rows)
    _sweep_kernel[(triton.cdiv(C, blocks["BC"]), B * H)](
        x, y, z, g, first, out, last, kept, N, H, R, C, num_kept, scale,
        ON_ROWS=on_rows, BACK=back, REVERSE=reverse, EVERY=every, PRECISION=_precision(x.dtype), **blocks, num_warps=num_warps,
    )  # fmt: skip
    return out, last, kept


def _blocks(R: int, C: int, dtype: torch.dtype, on_rows: bool) -> tuple[dict[str, int], int]:
    """Tile sizes and warps for which nothing is spilled on sm_80 and sm_90; tensor cores want 16 of everything."""
    BR, BC = (max(16, triton.next_power_of_2(width)) for width in (R, C))
    if dtype == torch.float32:
        return {"BT": 16, "BR": BR, "BC": min(BC, 16 if on_rows else 32)}, 8
    return {"BT": 16, "BR": BR, "BC": min(BC, 32 if BR <= 64 else 16)}, 4 if BR <= 64 else 8


def _precision(dtype: torch.dtype) -> str:
    """Single precision is kept; half-precision numbers fit tf32 whole."""
    return "ieee" if dtype == torch.float32 else "tf32"


def _plain(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous; widened for the interpreter, which computes wrongly in bfloat16."""
    return tuple((x.float() if is_interpreting() else x).contiguous() for x in tensors)


@torch.library.custom_op("genkit::gla_triton", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor, scale: float, reverse: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.float32 if is_interpreting() else v.dtype
    q_, k_, v_, g_, first = _plain(q, k, v, g, initial_state)
    o, state, _ = _sweep(q_, k_, v_, g_, first, scale, reverse, dtype=dtype, on_rows=True, back=False)
    return o.to(v.dtype), state


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor, scale: float, reverse: bool
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), initial_state.new_empty(initial_state.shape)


@torch.library.custom_op("genkit::gla_triton_backward", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q_, k_, v_, g_, first, do_, last = _plain(q, k, v, g, initial_state, do, dstate)
    dv, dinitial, _ = _sweep(k_, q_, do_, g_, last, scale, reverse, on_rows=True, back=True)
    dq, _, states = _sweep(do_, v_, k_, g_, first, scale, reverse, on_rows=False, back=False)
    dk, _, adjoints = _sweep(v_, do_, q_, g_, last, scale, reverse, on_rows=False, back=True)
    dg = _gate_gradient(q_ * dq - k_ * dk, (states * adjoints).sum(-1), reverse)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dg.to(g.dtype), dinitial


def _gate_gradient(change: Tensor, anchors: Tensor, reverse: bool) -> Tensor:
    """dg_t = <a_t S_{t-1}, D_t>, which from one token to the one before changes by q dq - k dk, and is known at every boundary of _EVERY tokens.

    change [B, N, H, K], anchors [B, H, n + 1, K] -> [B, N, H, K]
    """
    N = change.shape[1]
    change = change.flip(1) if reverse else change
    change = torch.nn.functional.pad(change, (0, 0, 0, 0, 0, -N % _EVERY)).unflatten(1, (-1, _EVERY))
    dg = change.flip(2).cumsum(2).flip(2) + anchors[:, :, 1:].transpose(1, 2)[:, :, None]
    dg = dg.flatten(1, 2)[:, :N]
    return dg.flip(1) if reverse else dg


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dg, dinitial = (x.new_empty(x.shape) for x in (q, k, v, g, initial_state))
    return dq, dk, dv, dg, dinitial


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, do: Tensor, dstate: Tensor) -> tuple[Any, ...]:
    return (*_backward(*ctx.saved_tensors, do, dstate, ctx.scale, ctx.reverse), None, None)


_forward.register_autograd(_gradients, setup_context=_save)


def variants() -> list[dict[str, Any]]:
    """What to compile ahead of time: the four roles in float32 and bfloat16, for the head widths of published models."""
    found = []
    roles = {"o": (True, False), "dv": (True, True), "dq": (False, False), "dk": (False, True)}
    for kind, dtype, widths in (("fp32", torch.float32, (64,)), ("bf16", torch.bfloat16, (64, 128))):
        for width in widths:
            for name, (on_rows, back) in roles.items():
                blocks, num_warps = _blocks(width, width, dtype, on_rows)
                arguments = dict.fromkeys(("x", "y", "z"), f"*{kind}")
                arguments |= dict.fromkeys(("g", "first", "last", "kept"), "*fp32")
                arguments |= dict.fromkeys(("N", "H", "R", "C", "num_kept"), "i32")
                arguments |= {"scale": "fp32", "out": f"*{kind if name == 'o' else 'fp32'}"}
                found.append(
                    {
                        "kernel": _sweep_kernel,
                        "name": f"gla_{name}_{kind}_{width}",
                        "signature": {key: arguments.get(key, "constexpr") for key in _sweep_kernel.arg_names},
                        "constexprs": {
                            "ON_ROWS": on_rows,
                            "BACK": back,
                            "REVERSE": False,
                            "EVERY": 0 if on_rows else _EVERY,
                            "PRECISION": _precision(dtype),
                            **blocks,
                        },
                        "num_warps": num_warps,
                        "num_stages": 2,
                    }
                )
    return found
