"""ConvS5 as two real convolutions of all frames around one complex scan over time, of which every channel of every pixel is a channel.

The channels lie innermost throughout, with re and im as neighbours: the convolution's output is the scan's input as it lies.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from genkit.kernels.linrec.op import linrec


def convscan(u: Tensor, decay: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.convscan`. Autocast is switched off: complex numbers have no half precision."""
    with torch.autocast(u.device.type, enabled=False):
        return _convscan(u, decay, B, C, state)


def _convscan(u: Tensor, decay: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, F, Y, X = u.shape
    P = decay.shape[0]
    frames = u.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)  # [B F, D, Y, X]
    weight = torch.view_as_real(B).movedim(-1, 1).flatten(0, 1)  # [2P, D, k, k]
    driven = conv2d(frames, weight, padding="same").permute(0, 2, 3, 1).contiguous()  # [B F, Y, X, 2P]
    inputs = torch.view_as_complex(driven.view(batch, F, Y * X * P, 2))
    x = linrec(decay.repeat(Y * X), inputs, state.permute(0, 2, 3, 1).flatten(1))  # [B, F, Y X P]
    last = x[:, -1].unflatten(1, (Y, X, P)).permute(0, 3, 1, 2)
    states = torch.view_as_real(x).reshape(batch * F, Y, X, 2 * P).permute(0, 3, 1, 2)  # channels innermost
    read = torch.view_as_real(2 * C.conj().resolve_conj()).movedim(-1, 2).flatten(1, 2)  # [O, 2P, k, k]
    return conv2d(states, read, padding="same").unflatten(0, (batch, F)).transpose(1, 2), last
