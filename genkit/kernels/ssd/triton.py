"""Triton kernel of ssd, in chunks of tokens. Forward and backward are one sweep with other roles (as in genkit/kernels/linear_attention.h): a program owns
a block of columns of one head's state S [R, C], keeps it in registers and walks over the chunks,

    out = reach (x S) + (x y^T * decay) z,   S = exp(G_last) S + (write y)^T z         x, y [BT, R], z, out [BT, C]

    o     forward in time    x = q,  y = k,  z = v         dv   backward in time   x = k,  y = q,  z = do
    dq    forward in time    x = do, y = v,  z = k         dk   backward in time   x = v,  y = do, z = q

with G the sum of log decays since the chunk's start: forward in time a row reads through exp(G) and writes through exp(G_last - G), backward the other way
round (Dao and Gu 2024, section 6, with the state passed on inside the program)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genkit.dispatch import is_interpreting

_EVERY = 64  # tokens between the states that anchor the gradient of the decays
_MOST = 128  # channels: the state of a program stays in registers
_MOST_SINGLE = 64  # in float32, whose products run without tensor cores from whole rows in registers


@triton.jit
def _sweep_kernel(
    x, y, z, g, first, out, last, kept, N, H, x_heads, y_heads, z_heads, R, C, num_kept, scale,
    BY_COLUMN: tl.constexpr, BACK: tl.constexpr, REVERSE: tl.constexpr, EVERY: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(1).to(tl.int64)
    batch, head = program // H, program % H
    r, c = tl.arange(0, BR), tl.program_id(0) * BC + tl.arange(0, BC)
    rows = tl.arange(0, BT)
    is_r, is_c = r < R, c < C
    # In memory a state is [K, V]: rows first, or columns first where columns are the keys.
    place = c[None, :] * R + r[:, None] if BY_COLUMN else r[:, None] * C + c[None, :]  # [BR, BC]
    is_place = is_r[:, None] & is_c[None, :]
    S = tl.load(first + program * R * C + place, mask=is_place, other=0.0).to(tl.float32)
    for walked in range(0, N, BT):
        start = (N - 1) // BT * BT - walked if BACK else walked
        if EVERY > 0:
            # The state at the boundary that this chunk is entered through: its start, or backward in time its end.
            end = tl.minimum(start + BT, N)
            if BACK:
                if (end % EVERY == 0) | (end == N):
                    tl.store(kept + (program * num_kept + (end + EVERY - 1) // EVERY) * R * C + place, S, mask=is_place)
            else:
                if start % EVERY == 0:
                    tl.store(kept + (program * num_kept + start // EVERY) * R * C + place, S, mask=is_place)
        step = (start + rows).to(tl.int64)
        token = batch * N + (N - 1 - step if REVERSE else step)  # [BT]
        is_token = step < N
        # Heads next to each other share a group of q and k.
        x_row = token * x_heads + head * x_heads // H
        y_row = token * y_heads + head * y_heads // H
        z_row = token * z_heads + head * z_heads // H
        in_r, in_c = is_token[:, None] & is_r[None, :], is_token[:, None] & is_c[None, :]
        xs = tl.load(x + x_row[:, None] * R + r[None, :], mask=in_r, other=0.0).to(tl.float32)
        ys = tl.load(y + y_row[:, None] * R + r[None, :], mask=in_r, other=0.0).to(tl.float32)
        zs = tl.load(z + z_row[:, None] * C + c[None, :], mask=in_c, other=0.0).to(tl.float32)
        gs = tl.load(g + token * H + head, mask=is_token, other=0.0).to(tl.float32)
        if BACK:
            ys *= scale
        else:
            xs *= scale
        gs = tl.maximum(
            gs, -60.0
        )  # exp of it is below what rounds; the difference of two sums that hold -inf is no number
        G = tl.cumsum(gs, 0)  # [BT]
        total = tl.sum(gs, 0)
        to_end = tl.exp(tl.minimum(total - G, 0.0))
        from_start = tl.exp(G)
        reach = to_end if BACK else from_start
        write = from_start if BACK else to_end
        passed = G[None, :] - G[:, None] if BACK else G[:, None] - G[None, :]  # [BT, BT]
        sees = rows[:, None] <= rows[None, :] if BACK else rows[:, None] >= rows[None, :]
        decay = tl.exp(tl.where(sees, tl.minimum(passed, 0.0), float("-inf")))
        weights = tl.dot(xs, tl.trans(ys), input_precision=PRECISION) * decay
        o = tl.dot(xs, S, input_precision=PRECISION) * reach[:, None]
        o += tl.dot(weights, zs, input_precision=PRECISION)
        S = S * tl.exp(total) + tl.dot(tl.trans(ys * write[:, None]), zs, input_precision=PRECISION)
        out_row = token * H + head
        tl.store(out + out_row[:, None] * C + c[None, :], o.to(out.dtype.element_ty), mask=in_c)
    tl.store(last + program * R * C + place, S, mask=is_place)
    if EVERY > 0:
        if not BACK:
            tl.store(kept + (program * num_kept + num_kept - 1) * R * C + place, S, mask=is_place)


def refuses(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor, scale: float, reverse: bool
) -> str | None:
    """Why these arguments need another path."""
    if v.dtype == torch.float64:
        return f"it computes in float32, these are {v.dtype}"
    widest, most = max(q.shape[3], v.shape[3]), _MOST_SINGLE if v.dtype == torch.float32 else _MOST
    return None if widest <= most else f"in {v.dtype} it takes at most {most} channels per head, these have {widest}"


def ssd(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor, scale: float, reverse: bool
) -> tuple[Tensor, Tensor]:
    """As `reference.ssd`."""
    return _forward(q, k, v, g, initial_state, scale, reverse)


def _sweep(
    x: Tensor, y: Tensor, z: Tensor, g: Tensor, first: Tensor, scale: float, reverse: bool,
    *, dtype: torch.dtype = torch.float32, by_column: bool, back: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out [B, N, H, C], the state at the other end, and for keys as columns the states every _EVERY tokens, [B, H, n + 1, K, V]."""
    (B, N, H), R, C = g.shape, x.shape[3], z.shape[3]
    out, last = z.new_empty(B, N, H, C, dtype=dtype), torch.empty_like(first)
    num_kept = triton.cdiv(N, _EVERY) + 1 if by_column else 0
    kept = first.new_zeros(B, H, num_kept, *first.shape[2:])
    blocks, num_warps = _blocks(R, C, x.dtype)
    _sweep_kernel[(triton.cdiv(C, blocks["BC"]), B * H)](
        x, y, z, g, first, out, last, kept, N, H, x.shape[2], y.shape[2], z.shape[2], R, C, num_kept, scale,
        BY_COLUMN=by_column, BACK=back, REVERSE=reverse, EVERY=_EVERY if by_column else 0, PRECISION=_precision(x.dtype),
        **blocks, num_warps=num_warps,
    )  # fmt: skip
    return out, last, kept


def _blocks(R: int, C: int, dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """Tile sizes and warps for which nothing is spilled on sm_80 and sm_90; tensor cores want 16 of everything."""
    BR, BC = (max(16, triton.next_power_of_2(width)) for width in (R, C))
    if dtype == torch.float32:
        return {"BT": 16, "BR": BR, "BC": 16}, 8
    return {"BT": 32, "BR": BR, "BC": min(BC, 32 if BR <= 64 else 16)}, 8


def _precision(dtype: torch.dtype) -> str:
    """Single precision is kept; half-precision numbers fit tf32 whole."""
    return "ieee" if dtype == torch.float32 else "tf32"


def _plain(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous; widened for the interpreter, which computes wrongly in bfloat16."""
    return tuple((x.float() if is_interpreting() else x).contiguous() for x in tensors)


@torch.library.custom_op("genkit::ssd_triton", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor, scale: float, reverse: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.float32 if is_interpreting() else v.dtype
    q_, k_, v_, g_, first = _plain(q, k, v, g, initial_state)
    o, state, _ = _sweep(q_, k_, v_, g_, first, scale, reverse, dtype=dtype, by_column=False, back=False)
    return o.to(v.dtype), state


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor, scale: float, reverse: bool
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), initial_state.new_empty(initial_state.shape)


@torch.library.custom_op("genkit::ssd_triton_backward", mutates_args=())
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
    dv, dinitial, _ = _sweep(k_, q_, do_, g_, last, scale, reverse, by_column=False, back=True)
    dq, _, states = _sweep(do_, v_, k_, g_, first, scale, reverse, by_column=True, back=False)
    dk, _, adjoints = _sweep(v_, do_, q_, g_, last, scale, reverse, by_column=True, back=True)
    (B, N, H), (G, K) = g.shape, q.shape[2:]
    dq, dk = (x.view(B, N, G, H // G, K) for x in (dq, dk))
    change = (q_[:, :, :, None] * dq - k_[:, :, :, None] * dk).sum(-1).flatten(2)  # [B, N, H]
    dg = _gate_gradient(change, (states * adjoints).sum((-2, -1)), reverse)
    return dq.sum(3).to(q.dtype), dk.sum(3).to(k.dtype), dv.to(v.dtype), dg.to(g.dtype), dinitial


def _gate_gradient(change: Tensor, anchors: Tensor, reverse: bool) -> Tensor:
    """dg_t = <a_t S_{t-1}, D_t>, which from one token to the one before changes by q dq - k dk, and is known at every boundary of _EVERY tokens.

    change [B, N, H], anchors [B, H, n + 1] -> [B, N, H]
    """
    N = change.shape[1]
    change = change.flip(1) if reverse else change
    change = torch.nn.functional.pad(change, (0, 0, 0, -N % _EVERY)).unflatten(1, (-1, _EVERY))  # [B, n, _EVERY, H]
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
    roles = {"o": (False, False), "dv": (False, True), "dq": (True, False), "dk": (True, True)}
    for kind, dtype, widths in (("fp32", torch.float32, (64,)), ("bf16", torch.bfloat16, (64, 128))):
        for width in widths:
            for name, (by_column, back) in roles.items():
                blocks, num_warps = _blocks(width, width, dtype)
                arguments = dict.fromkeys(("x", "y", "z"), f"*{kind}")
                arguments |= dict.fromkeys(("g", "first", "last", "kept"), "*fp32")
                arguments |= dict.fromkeys(("N", "H", "x_heads", "y_heads", "z_heads", "R", "C", "num_kept"), "i32")
                arguments |= {"scale": "fp32", "out": f"*{kind if name == 'o' else 'fp32'}"}
                constants = {
                    "BY_COLUMN": by_column,
                    "BACK": back,
                    "REVERSE": False,
                    "EVERY": _EVERY if by_column else 0,
                    "PRECISION": _precision(dtype),
                    **blocks,
                }
                found.append(
                    {
                        "kernel": _sweep_kernel,
                        "name": f"ssd_{name}_{kind}_{width}",
                        "signature": {key: arguments.get(key, "constexpr") for key in _sweep_kernel.arg_names},
                        "constexprs": constants,
                        "num_warps": num_warps,
                        "num_stages": 2,
                    }
                )
    return found
