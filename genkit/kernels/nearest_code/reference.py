"""Nearest code by writing every distance down: the specification that faster paths are compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_code(z: Tensor, codes: Tensor, *, cosine: bool = False) -> Tensor:
    """For every row of `z` the number of the code that is nearest to it; the lowest number where several are.

    Args:
        z: [G, N, d] float32, rows of G independent groups.
        codes: [G, S, d] float32, one table per group.
        cosine: nearest means the largest dot product (both sides of length 1) instead of the smallest Euclidean distance.

    Returns:
        ids [G, N] int64 in [0, S).
    """
    scores = (
        torch.einsum("gnd,gsd->gns", z, codes) if cosine else -(z[:, :, None] - codes[:, None]).square().sum(-1)
    )  # [G, N, S]
    return scores.argmax(-1)
