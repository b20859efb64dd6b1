"""OctFormer: a transformer stage on octree nodes with window attention, relative positions and a convolution as position encoding.

Wang, "OctFormer: Octree-based Transformers for 3D Point Clouds", 2023; `octree-nn/octformer models/octformer.py` with the group convolution (its
`use_dwconv=False`) or the depthwise one; its released code adds the relative position table.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from genkit.kernels.octree_attention.op import octree_attention
from genkit.kernels.octree_attention.windows import to_windows
from genkit.nn.drop_path import DropPath
from genkit.nn.octree_conv import OctreeConv
from genkit.octree.octree import Octree

_CPE_GROUPS = 8


class OctreeAttention(nn.Module):
    """Self-attention in windows of nodes that follow one another in z-order, or stand `dilation` apart.

    Args:
        dim: D.
        num_heads: H.
        window: nodes per window.
        dilation: 1 = neighbours in z-order.
        has_positions: a learned table of clamped distances along each axis is added to the scores.
        has_bias: of queries, keys and values.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int,
        dilation: int = 1,
        has_positions: bool = True,
        has_bias: bool = True,
    ):
        super().__init__()
        self.num_heads, self.window, self.dilation = num_heads, window, dilation
        self.qkv = nn.Linear(dim, 3 * dim, bias=has_bias)
        self.proj = nn.Linear(dim, dim)
        self.reach = int(0.8 * window * math.sqrt(dilation))
        self.table = None
        if has_positions:
            self.table = nn.Parameter(torch.empty(3 * (2 * self.reach + 1), num_heads))
            nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, x: Tensor, xyz: Tensor, samples: Tensor) -> Tensor:
        """x [M, D] of nodes at xyz [M, 3] (int64) that belong to samples [M]."""
        q, k, v = self.qkv(x).unflatten(1, (3, self.num_heads, -1)).unbind(1)  # [M, H, K]
        bias = self.bias(xyz) if self.table is not None else None
        y = octree_attention(q, k, v, samples, window=self.window, dilation=self.dilation, bias=bias)
        return self.proj(y.flatten(1))

    def bias(self, xyz: Tensor) -> Tensor:
        """[W, H, window, window]."""
        assert self.table is not None
        axis = torch.arange(3, device=xyz.device) * (2 * self.reach + 1)
        rows = relative(xyz, self.window, self.dilation).clamp(-self.reach, self.reach) + self.reach + axis
        return self.table[rows].sum(3).permute(0, 3, 1, 2)


def relative(xyz: Tensor, window: int, dilation: int) -> Tensor:
    """[W, window, window, 3]: places of a window's nodes from each other, query minus key."""
    place = to_windows(xyz, window, dilation=dilation)
    return place[:, :, None] - place[:, None]


class PositionConv(nn.Module):
    """Conditional position encoding: a convolution over the neighbourhood, in 8 groups or of each channel by itself, and a batch norm."""

    def __init__(self, dim: int, *, is_depthwise: bool = False, is_dense: bool = False):
        super().__init__()
        self.conv = OctreeConv(dim, dim, groups=dim if is_depthwise else _CPE_GROUPS, is_dense=is_dense)
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, x: Tensor, octree: Octree, depth: int) -> Tensor:
        return self.norm(self.conv(x, octree, depth))


class OctFormerBlock(nn.Module):
    """x + positions, then attention and an MLP with residuals, norms before them."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = 32,
        dilation: int = 1,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        has_positions: bool = True,
        has_bias: bool = True,
        is_depthwise: bool = False,
        is_dense: bool = False,
        activation: type[nn.Module] = nn.GELU,
    ):
        super().__init__()
        self.is_dense = is_dense
        self.positions = PositionConv(dim, is_depthwise=is_depthwise, is_dense=is_dense)
        self.norm1 = nn.LayerNorm(dim)
        self.attention = OctreeAttention(
            dim, num_heads, window=window, dilation=dilation, has_positions=has_positions, has_bias=has_bias
        )
        self.norm2 = nn.LayerNorm(dim)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), activation(), nn.Linear(hidden, dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, octree: Octree, depth: int) -> Tensor:
        """x [M, D] of the nodes of `depth`, of the occupied ones where it is not dense."""
        xyz, samples = octree.xyz(depth), octree.samples(depth)
        if not self.is_dense:
            xyz, samples = xyz[octree.occupied(depth)], samples[octree.occupied(depth)]
        x = x + self.positions(x, octree, depth)
        x = x + self._dropped(self.attention(self.norm1(x), xyz, samples), samples, octree.batch_size)
        return x + self._dropped(self.mlp(self.norm2(x)), samples, octree.batch_size)

    def _dropped(self, branch: Tensor, samples: Tensor, batch_size: int) -> Tensor:
        """Whole samples lose the branch, not single nodes."""
        if not self.training:
            return branch
        return branch * self.drop_path(branch.new_ones(batch_size, 1))[samples]


class OctFormerStage(nn.Sequential):
    """Blocks by turns without and with dilation."""

    def __init__(self, dim: int, num_heads: int, depth: int, *, dilation: int = 4, **options: Any):
        super().__init__(
            *(OctFormerBlock(dim, num_heads, dilation=1 if i % 2 == 0 else dilation, **options) for i in range(depth))
        )

    def forward(self, x: Tensor, octree: Octree, depth: int) -> Tensor:  # type: ignore[override]
        for block in self:
            x = block(x, octree, depth)
        return x
