"""Relative positions for linear attention on grids of any number of axes: MD-LRPE (Qin et al., "LightNet", 2024).

A token at (n_1 .. n_A) has the angles n_1 theta, n_2 theta, .., cut to as many as the head needs, with theta_i = base^(-2 i / K) for every axis.
Two ways to put them on queries and keys of width K:

    rotary   channel pairs (2 i, 2 i + 1) turn by an angle each; the width stays
    cosine   x -> [x cos, x sin]; the width doubles, and q.k becomes sum_c q_c k_c cos(theta_c (n - m))

Either way shifting all tokens leaves products of queries with keys as they are. Unlike nn/rope.py, which splits the head evenly between axes and stretches
the wavelengths over each part, every axis has the same first, short wavelengths here. The table of angles is the same for all heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.nn.rope import turn_pairs

FLAVOURS = ("rotary", "cosine")


def lrpe_angles(coords: Tensor, head_dim: int, flavour: str, base: float = 10_000.0) -> Tensor:
    """coords [B or 1, N, A] -> angles [B or 1, N, 1, K / 2] for "rotary", [.., K] for "cosine", float32.

    Raises: UsageError for an odd head width with "rotary", or one with fewer angles than axes.
    """
    if flavour == "rotary" and head_dim % 2:
        raise UsageError(f"rotary positions need an even head width, found {head_dim}")
    num_axes = coords.shape[-1]
    num_angles = head_dim // 2 if flavour == "rotary" else head_dim
    if num_angles < num_axes:
        raise UsageError(
            f"{flavour} positions need an angle for each of {num_axes} axes, a head of {head_dim} has {num_angles}"
        )
    per_axis = -(-num_angles // num_axes)
    theta = base ** (-2 * torch.arange(per_axis, dtype=torch.float32, device=coords.device) / head_dim)
    angles = (coords.float().unsqueeze(-1) * theta).flatten(-2)  # [B, N, A * per_axis]
    return angles[..., :num_angles].unsqueeze(-2)


def lrpe(x: Tensor, angles: Tensor, flavour: str) -> Tensor:
    """x [B, N, H, K] -> [B, N, H, K], or [B, N, H, 2 K] for "cosine"."""
    if flavour == "cosine":
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        return torch.cat([x * cos, x * sin], dim=-1)
    return turn_pairs(x, angles)


def lrpe_factors(q: Tensor, angles: Tensor, flavour: str) -> tuple[Tensor, Tensor]:
    """Queries q [B, N, H, K] -> (r, f), both of width 2 K, so that lrpe(q) . lrpe(w) = r . (f [w, w]) for any w.

    Where w is a softmax over tokens that a recurrence updates per channel, positions can so be put on what it sums instead of on w: a turn
    would mix two channels that decay at different rates.
    """
    if flavour == "cosine":
        cos, sin = angles.cos(), angles.sin()
        return lrpe(q, angles, flavour), torch.cat([cos, sin], dim=-1).to(q.dtype)
    there = lrpe(q, angles, flavour)
    a, b = there.unflatten(-1, (-1, 2)).unbind(-1)
    aside = torch.stack([b, -a], dim=-1).flatten(-2)
    pairs = angles.repeat_interleave(2, dim=-1)
    return torch.cat([there, aside], dim=-1), torch.cat([pairs.cos(), pairs.sin()], dim=-1).to(q.dtype)
