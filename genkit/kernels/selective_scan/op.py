"""The selective scan of Mamba: a diagonal state space whose step size, input and output maps depend on the token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genkit.dispatch import Operation

_selective_scan = Operation("selective_scan")
_MOST_STATES = 256


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D_skip: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    return_state: bool = False,
    path: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y [B, N, D], in the dtype of u, from one state h [B, D, R] that no path ever stores for all tokens (Gu & Dao 2023, algorithm 2).

        d_t = delta_t + delta_bias, through softplus where asked
        h_t = exp(d_t A) h_{t-1} + d_t u_t B_t        per channel and state; zero-order hold for A, Euler for B, as published
        y_t = (C_t . h_t + D_skip u_t) silu(z_t)      without the last factor where z is None

    Where A is complex, so are B, C and the state: each stands for itself and its conjugate, and y has 2 Re(C_t . h_t).

    All arithmetic is in float32, or float64 where u is. Everything but the switches is differentiable, the returned state too.

    Args:
        u: [B, N, D], the input.
        delta: [B, N, D], the step size before bias and softplus; dtype of u.
        A: [D, R], the decay rate, its real part negative for a state that fades; R <= 256. Mamba trains log(-A). Complex ones run by torch alone.
        B, C: [B, N, R], or [B, N, G, R] where D / G adjacent channels share a group; dtype of u, or that of a complex A. Or [D, R], one for each channel
            and the same for all tokens. Where the two have different groups, both are laid out in their least common multiple, constant ones in D of them: memory for that
            many values per token.
        D_skip: [D], weight of the input in the output; None = 0.
        z: [B, N, D], the gate; dtype of u; None = no gate.
        delta_bias: [D], added to delta; None = 0.
        delta_softplus: whether delta + delta_bias goes through softplus.
        initial_state: [B, D, R], the state before the first token; None = 0.
        reverse: the recurrence runs from the last token to the first, and initial_state stands behind the last.
        return_state: also return the state after the token that comes last in the recurrence, [B, D, R] in float32 (float64 where u is), or the complex
            numbers of that precision.
        path: see genkit.dispatch.

    A, D_skip, delta_bias and initial_state may be float32 beside inputs of lower precision.

    The published code (state-spaces/mamba mamba_ssm/ops/selective_scan_interface.py) keeps channels before tokens: there u, delta and z are [B, D, N],
    B and C are [B, R, N] or [B, G, R, N]. Each is moveaxis(-1, 1) of its name here. Beside a complex A its B and C hold real and imaginary parts as
    neighbours along 2 N; here they are complex. Unlike it, this takes an initial state and the gradient of the returned one.

    Raises: ValueError for shapes, dtypes or devices that do not fit, naming the argument; UsageError for a path that cannot run.
    """
    if u.ndim != 3 or 0 in u.shape:
        raise ValueError(f"selective_scan: u must be [B, N, D], none of them 0, got {list(u.shape)}")
    if not u.is_floating_point():
        raise ValueError(f"selective_scan: u must hold floating-point numbers, got {u.dtype}")
    batch, N, D = u.shape
    if A.ndim != 2 or A.shape[0] != D or not 1 <= A.shape[1] <= _MOST_STATES:
        raise ValueError(
            f"selective_scan: A must be [{D}, R] to go with u, with R of 1 to {_MOST_STATES}, got {list(A.shape)}"
        )
    R = A.shape[1]
    B, C = _grouped("B", B, batch, N, D, R), _grouped("C", C, batch, N, D, R)
    if B.shape != C.shape:
        groups = math.lcm(B.shape[2], C.shape[2])
        B, C = (x.repeat_interleave(groups // x.shape[2], 2) for x in (B, C))
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    number = torch.promote_types(wide, torch.complex64)
    tokens: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("delta", delta, (batch, N, D)),
        ("z", z, (batch, N, D)),
    ]
    weights: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("A", A, (D, R)),
        ("D_skip", D_skip, (D,)),
        ("delta_bias", delta_bias, (D,)),
        ("initial_state", initial_state, (batch, D, R)),
    ]
    for name, given, shape in [*tokens, ("B", B, B.shape), ("C", C, C.shape), *weights]:
        if given is None:
            continue
        if given.shape != shape:
            raise ValueError(f"selective_scan: {name} must be {list(shape)} to go with u, got {list(given.shape)}")
        if given.device != u.device:
            raise ValueError(f"selective_scan: {name} is on {given.device}, u on {u.device}; they must agree")
        if A.is_complex() and name in ("A", "B", "C", "initial_state"):
            allowed = {number}
        else:
            allowed = {u.dtype, wide} if name in ("A", "D_skip", "delta_bias", "initial_state") else {u.dtype}
        if given.dtype not in allowed:
            expected = " or ".join(sorted(map(str, allowed)))
            beside = f"u of {u.dtype}" + (f" and A of {A.dtype}" if A.is_complex() or given.is_complex() else "")
            raise ValueError(f"selective_scan: {name} must be {expected} beside {beside}, got {given.dtype}")
    if initial_state is None:
        initial_state = u.new_zeros(batch, D, R, dtype=number if A.is_complex() else wide)
    y, state = _selective_scan(
        path, u, delta, A, B, C, D_skip, z, delta_bias, initial_state, bool(delta_softplus), bool(reverse)
    )
    return (y, state) if return_state else y


def _grouped(name: str, given: Tensor, batch: int, N: int, D: int, R: int) -> Tensor:
    """B or C as [B, N, G, R]."""
    if given.shape == (D, R):
        return given.expand(batch, N, D, R)
    if given.ndim not in (3, 4) or given.shape[:2] != (batch, N) or given.shape[-1] != R:
        raise ValueError(
            f"selective_scan: {name} must be [{batch}, {N}, {R}], [{batch}, {N}, G, {R}] or [{D}, {R}] to go with u and A, got {list(given.shape)}"
        )
    given = given[:, :, None] if given.ndim == 3 else given
    groups = given.shape[2]
    if groups < 1 or D % groups:
        raise ValueError(f"selective_scan: {name} has {groups} groups; they must divide the {D} channels of u")
    return given
