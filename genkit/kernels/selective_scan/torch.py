"""The selective scan in plain torch: blocks of tokens side by side, one stretch of the sequence in memory at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, silu, softplus
from torch.utils.checkpoint import checkpoint

# A stretch is 256 tokens: 16 blocks that are scanned side by side in 16 steps, then joined in 16.
_STEPS, _BLOCKS = 16, 16


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
    """As `reference.selective_scan`. States exist for one stretch of 256 tokens at a time; the backward pass computes each stretch again."""
    dtype, N = u.dtype, u.shape[1]
    wide = torch.promote_types(dtype, torch.float32)
    u, d = u.to(wide), delta.to(wide)
    A, B, C, h = (x.to(torch.promote_types(wide, A.dtype)) for x in (A, B, C, initial_state))
    if delta_bias is not None:
        d = d + delta_bias.to(wide)
    d = softplus(d, threshold=20) if delta_softplus else d
    steps = min(_STEPS, N)
    stretch = steps * min(_BLOCKS, -(-N // steps))
    # Tokens added at the end have d = 0: they leave the state as it is.
    rows = [_fill(x.flip(1) if reverse else x, -N % stretch) for x in (d, d * u, B, C)]
    pieces = []
    for parts in zip(*(x.split(stretch, 1) for x in rows), strict=True):
        piece, h = checkpoint(_stretch, *parts, A, h, steps, use_reentrant=False)
        pieces.append(piece)
    y = torch.cat(pieces, 1)[:, :N]
    y = y.flip(1) if reverse else y
    if y.is_complex():
        y = 2 * y.real
    if D_skip is not None:
        y = y + D_skip.to(wide) * u
    if z is not None:
        y = y * silu(z.to(wide))
    return y.to(dtype), h


def _stretch(d: Tensor, x: Tensor, B: Tensor, C: Tensor, A: Tensor, h: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """C . h [B, n, D] of one stretch and the state behind it; d and x = d u are [B, n, D], the state h before it [B, D, R]."""
    batch, n, D = d.shape
    groups = B.shape[2]
    blocks = n // steps
    d, x = (v.reshape(batch, blocks, steps, groups, -1, 1) for v in (d, x))
    B, C = (v.reshape(batch, blocks, steps, groups, 1, -1) for v in (B, C))
    decays = torch.exp(d * A.reshape(groups, D // groups, -1)).unbind(2)  # each [B, blocks, G, D/G, R]
    inputs = (x * B).unbind(2)
    states, products = [inputs[0]], [decays[0]]  # of each block alone, from a state of 0; and its decay so far
    for decay, put in zip(decays[1:], inputs[1:], strict=True):
        states.append(torch.addcmul(put, decay, states[-1]))
        products.append(decay * products[-1])
    before = [h.reshape(batch, groups, D // groups, -1)]
    for last, product in zip(states[-1].unbind(1), products[-1].unbind(1), strict=True):
        before.append(torch.addcmul(last, product, before[-1]))
    entering = torch.stack(before[:-1], 1)  # [B, blocks, G, D/G, R], the state before each block
    y = [
        (torch.addcmul(state, product, entering) * c).sum(-1)
        for state, product, c in zip(states, products, C.unbind(2), strict=True)
    ]
    return torch.stack(y, 2).reshape(batch, n, D), before[-1].reshape(batch, D, -1)


def _fill(x: Tensor, missing: int) -> Tensor:
    """[B, N, ...] with `missing` tokens of zeros behind."""
    return pad(x, (0, 0) * (x.ndim - 2) + (0, missing)) if missing else x
