"""S5 as two real matrix products around a complex scan. A complex matrix is a real one with re and im as neighbours, so nothing is copied between them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from genkit.kernels.linrec.op import linrec


def s5(u: Tensor, decay: Tensor, B: Tensor, C: Tensor, state: Tensor, is_bidirectional: bool) -> tuple[Tensor, Tensor]:
    """As `reference.s5`. Autocast is switched off: complex numbers have no half precision."""
    with torch.autocast(u.device.type, enabled=False):
        return _s5(u, decay, B, C, state, is_bidirectional)


def _s5(u: Tensor, decay: Tensor, B: Tensor, C: Tensor, state: Tensor, is_bidirectional: bool) -> tuple[Tensor, Tensor]:
    batch, N, _ = u.shape
    P = decay.shape[0]
    weight = torch.view_as_real(B).transpose(1, 2).flatten(0, 1)  # [2P, D]
    inputs = torch.view_as_complex(linear(u, weight).view(batch, N, P, 2))
    x = linrec(decay, inputs, state)
    y = linear(_pairs(x), _pairs(C[:, :P].conj()))  # Re(C x) = Re C Re x - Im C Im x
    if is_bidirectional:
        y = y + linear(_pairs(linrec(decay, inputs, reverse=True)), _pairs(C[:, P:].conj()))
    return y, x[:, -1]


def _pairs(z: Tensor) -> Tensor:
    """[..., P] complex as [..., 2P] real."""
    return torch.view_as_real(z.resolve_conj()).flatten(-2)
