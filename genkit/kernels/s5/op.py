"""S5: one linear time-invariant state space for all channels, diagonal in complex numbers; S4D is the case of one input and one output."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from genkit.dispatch import Operation

_s5 = Operation("s5")


def discretise(
    eigenvalues: Tensor, B: Tensor, step: Tensor, method: Literal["zoh", "bilinear"] = "zoh"
) -> tuple[Tensor, Tensor]:
    """The decay [P] and the input matrix [P, ...] of x_t = decay x_{t-1} + input u_t, from x' = eigenvalues x + B u and steps of time.

    Args:
        eigenvalues: [P] complex, real part below 0 where the state is to fade.
        B: [P, ...] complex.
        step: [P] real, above 0.
        method: "zoh" holds the input over a step, decay exp(step e) and input (exp(step e) - 1) / e; "bilinear" is the trapezoidal rule
            (Smith et al. 2023, "Simplified State Space Layers", appendix).
    """
    if method not in ("zoh", "bilinear"):
        raise ValueError(f"s5: method must be 'zoh' or 'bilinear', got {method!r}")
    if eigenvalues.ndim != 1 or step.shape != eigenvalues.shape or B.shape[:1] != eigenvalues.shape:
        raise ValueError(
            f"s5: eigenvalues [P], step [P] and B [P, ...] must agree, got {list(eigenvalues.shape)}, {list(step.shape)}, {list(B.shape)}"
        )
    scaled = step * eigenvalues
    if method == "zoh":
        decay = scaled.exp()
        # expm1: for a small step exp(x) - 1 would keep few digits. Its quotient by x is 1 at 0.
        is_zero = scaled == 0
        gain = step * torch.where(is_zero, 1, torch.expm1(scaled) / torch.where(is_zero, 1, scaled))
    else:
        gain = step / (1 - scaled / 2)
        decay = (1 + scaled / 2) / (1 - scaled / 2)
    return decay, gain.view(-1, *[1] * (B.ndim - 1)) * B


def s5(
    u: Tensor,
    decay: Tensor,
    B: Tensor,
    C: Tensor,
    skip: Tensor | None = None,
    *,
    is_conjugate: bool = True,
    is_bidirectional: bool = False,
    state: Tensor | None = None,
    return_state: bool = False,
    path: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y [B, N, O] with x_t = decay x_{t-1} + B u_t and y_t = 2 Re(C x_t) + skip u_t (Smith et al. 2023, "Simplified State Space Layers", eq. 5 and 6).

    Args:
        u: [B, N, D] real; bfloat16 and float16 are computed in float32.
        decay: [P] complex; with `discretise` from a continuous system.
        B: [P, D] complex.
        C: [O, P] complex; [O, 2P] when bidirectional, for the states from the left and then those from the right.
        skip: [D] real, needs O = D; None = no such term.
        is_conjugate: the P states stand for P conjugate pairs, hence the factor 2; otherwise it is 1.
        is_bidirectional: every token is also read by a scan from the last to the first.
        state: [B, P] complex, of the scan from the left before the first token; None = 0.
        return_state: also return that state behind the last token; not with is_bidirectional, which has no running state.
        path: see genkit.dispatch. The scan runs by `linrec`, which chooses its own path.

    Raises: ValueError for what does not fit, naming the argument; UsageError for a path that cannot run.
    """
    if u.ndim != 3 or 0 in u.shape or not u.is_floating_point():
        raise ValueError(f"s5: u must be [B, N, D], real, no size 0, got {list(u.shape)} {u.dtype}")
    if is_bidirectional and return_state:
        raise ValueError("s5: a bidirectional scan has no state to return")
    batch, _, D = u.shape
    P, O = decay.shape[0], C.shape[0]  # noqa: E741 - as in the docstring
    wide = torch.promote_types(u.dtype, torch.float32)
    number = torch.promote_types(wide, torch.complex64)
    state = u.new_zeros(batch, P, dtype=number) if state is None else state
    expected = [
        ("decay", decay, (P,), number),
        ("B", B, (P, D), number),
        ("C", C, (O, 2 * P if is_bidirectional else P), number),
        ("state", state, (batch, P), number),
    ]
    if skip is not None:
        expected.append(("skip", skip, (O,), wide))
        if O != D:
            raise ValueError(f"s5: skip needs as many outputs as inputs, C has {O} and u has {D}")
    for name, given, shape, dtype in expected:
        if given.shape != shape:
            raise ValueError(f"s5: {name} must be {list(shape)} to go with u {list(u.shape)}, got {list(given.shape)}")
        if given.dtype != dtype or given.device != u.device:
            raise ValueError(
                f"s5: {name} is {given.dtype} on {given.device}; to go with u it must be {dtype} on {u.device}"
            )
    C = 2 * C if is_conjugate else C
    y, last = _s5(path, u.to(wide), decay, B, C, state, is_bidirectional)
    y = y if skip is None else y + skip * u
    return (y.to(u.dtype), last) if return_state else y.to(u.dtype)
