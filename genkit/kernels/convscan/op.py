"""ConvS5: a linear state space over time whose state is an image; read and written by convolutions, decayed pixel by pixel."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.dispatch import Operation

_convscan = Operation("convscan")


def convscan(
    u: Tensor,
    decay: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    state: Tensor | None = None,
    return_state: bool = False,
    path: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y [B, O, F, Y, X] with x_t = decay x_{t-1} + B * u_t and y_t = 2 Re(C * x_t), where * is convolution over Y and X with a border of zeros
    (Smith et al. 2023, "Convolutional State Space Models for Long-Range Spatiotemporal Modeling", section 3).

    Args:
        u: [B, D, F, Y, X] real; bfloat16 and float16 are computed in float32. F frames are the steps of time.
        decay: [P] complex, half of the conjugate pairs; with `genkit.kernels.s5.op.discretise` from a continuous system.
        B: [P, D, k, k] complex, k odd.
        C: [O, P, k, k] complex, k odd.
        state: [B, P, Y, X] complex, before the first frame; None = 0.
        return_state: also return that state behind the last frame. Generation calls it with F = 1 and the state of the frame before.
        path: see genkit.dispatch. The scan runs by `linrec`, which chooses its own path.

    Raises: ValueError for what does not fit, naming the argument; UsageError for a path that cannot run.
    """
    if u.ndim != 5 or 0 in u.shape or not u.is_floating_point():
        raise ValueError(f"convscan: u must be [B, D, F, Y, X], real, no size 0, got {list(u.shape)} {u.dtype}")
    batch, D, _, Y, X = u.shape
    P = decay.shape[0]
    wide = torch.promote_types(u.dtype, torch.float32)
    number = torch.promote_types(wide, torch.complex64)
    for name, kernel in (("B", B), ("C", C)):
        if kernel.ndim != 4 or kernel.shape[2] != kernel.shape[3] or kernel.shape[2] % 2 == 0:
            raise ValueError(f"convscan: {name} must end in k x k with k odd, got {list(kernel.shape)}")
    state = u.new_zeros(batch, P, Y, X, dtype=number) if state is None else state
    for name, given, shape in (
        ("decay", decay, (P,)),
        ("B", B, (P, D, *B.shape[2:])),
        ("C", C, (C.shape[0], P, *C.shape[2:])),
        ("state", state, (batch, P, Y, X)),
    ):
        if given.shape != shape:
            raise ValueError(
                f"convscan: {name} must be {list(shape)} to go with u {list(u.shape)} and decay [{P}], got {list(given.shape)}"
            )
        if given.dtype != number or given.device != u.device:
            raise ValueError(
                f"convscan: {name} is {given.dtype} on {given.device}; to go with u it must be {number} on {u.device}"
            )
    y, last = _convscan(path, u.to(wide), decay, B, C, state)
    return (y.to(u.dtype), last) if return_state else y.to(u.dtype)
