"""Attention among the nodes of one window, window after window: the specification that faster paths are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.kernels.octree_attention.windows import to_windows


def octree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch_ids: Tensor,
    bias: Tensor | None,
    depth: Tensor | None,
    window: int,
    dilation: int,
    shift: int,
    scale: float,
) -> Tensor:
    """As `op.octree_attention`, arguments checked and given in full."""
    nodes = to_windows(torch.arange(len(q), device=q.device), window, dilation=dilation, shift=shift, fill=-1)
    out = torch.zeros_like(v)
    for w, row in enumerate(nodes):
        is_node = (row >= 0) & (batch_ids[row] >= 0)
        n = row[is_node]
        scores = scale * torch.einsum("ihk,jhk->hij", q[n], k[n])
        if bias is not None:
            scores = scores + bias[w if len(bias) > 1 else 0][:, is_node][:, :, is_node]
        hidden = batch_ids[n, None] != batch_ids[None, n]
        if depth is not None:
            hidden = hidden | (depth[n, None] < depth[None, n])
        p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out = out.index_copy(0, n, torch.einsum("hij,jhv->ihv", p, v[n]))
    return out
