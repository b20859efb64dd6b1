"""Convolution and normalisation on the nodes of one depth of an octree (Wang et al., "O-CNN", 2017; `octree-nn/ocnn-pytorch ocnn/nn`, MIT).

Packed nodes of a batch, [M, C]; what is outside the octree counts as 0. Dense: all nodes of a depth; not dense: the occupied ones.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from genkit.octree.octree import KERNELS, Octree
from genkit.octree.values import gather

_LEAST_GROUP = 4  # channels; narrower layers have fewer groups


def kernel_size(kernel: str) -> int:
    """Number of places of a kernel, "333" -> 27."""
    return math.prod(int(side) for side in kernel)


class OctreeConv(nn.Module):
    """Convolution over the neighbourhood of every node: y_i = sum_k x_(neighbour k of i) W_k + b.

    Args:
        in_channels, out_channels: both divisible by groups.
        kernel: "333", or another of genkit.octree.octree.KERNELS.
        stride: 2 = one depth up, one row per occupied parent where it is not dense, else all nodes of that depth with 0 at the empty ones.
        groups: independent slices of the channels.
        is_dense: over all nodes, else over the occupied ones.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: str = "333",
        stride: int = 1,
        groups: int = 1,
        is_dense: bool = True,
        has_bias: bool = False,
    ):
        super().__init__()
        if kernel not in KERNELS or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"kernel {kernel}, channels {in_channels} -> {out_channels}, groups {groups}: the kernels are {', '.join(KERNELS)}, and groups divide both"
            )
        self.kernel, self.stride, self.groups, self.is_dense = kernel, stride, groups, is_dense
        shape = (kernel_size(kernel), in_channels // groups, out_channels // groups)
        self.weight = nn.Parameter(torch.empty(groups, *shape))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if has_bias else None
        reach = math.sqrt(6 / (shape[0] * (shape[1] + shape[2])))  # Xavier; the fans count the places of the kernel
        nn.init.uniform_(self.weight, -reach, reach)

    def forward(self, x: Tensor, octree: Octree, depth: int) -> Tensor:
        """[M, in_channels] of `depth` -> [M', out_channels] of depth, or of depth - 1 with stride 2."""
        if self.kernel == "222" and self.stride == 2 and self.is_dense:
            columns = x.unflatten(0, (-1, 8))  # the eight siblings of every occupied parent stand together
            y = torch.einsum("mkgi,gkio->mgo", columns.unflatten(2, (self.groups, -1)), self.weight).flatten(1)
        else:
            rows = octree.neighbours_of(depth, self.kernel, self.stride, self.is_dense)
            y = _Convolve.apply(x, rows, self.weight, self.kernel == "333" and self.stride == 1)
        y = y if self.bias is None else y + self.bias
        if self.stride == 1 or not self.is_dense:
            return y
        return y.new_zeros(octree.count(depth - 1), y.shape[1]).index_copy(0, octree.occupied(depth - 1), y)


class _Convolve(torch.autograd.Function):
    """The columns of neighbours times the weights; they are gathered again for the gradient, and never kept.

    Around a full kernel with stride 1 neighbours are mutual: j is neighbour k of i exactly where i is neighbour 26 - k of j. The gradient of x is then
    a convolution of the gradient of y with the kernel turned around, instead of a scatter.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, weight: Tensor, is_mutual: bool) -> Tensor:
        ctx.save_for_backward(x, rows, weight)
        ctx.is_mutual = is_mutual
        return _convolve(x, rows, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        x, rows, weight = ctx.saved_tensors
        dx = dweight = None
        groups = len(weight)
        if ctx.needs_input_grad[0]:
            if ctx.is_mutual:
                dx = _convolve(dy, rows, weight.flip(1).mT)
            else:
                columns = torch.einsum("mgo,gkio->mkgi", dy.unflatten(1, (groups, -1)), weight).flatten(2)
                dx = x.new_zeros(len(x) + 1, x.shape[1])
                dx.index_add_(0, torch.where(rows < 0, len(x), rows).flatten(), columns.flatten(0, 1))
                dx = dx[:-1]
        if ctx.needs_input_grad[2]:
            columns = gather(x, rows).unflatten(2, (groups, -1))
            dweight = torch.einsum("mkgi,mgo->gkio", columns, dy.unflatten(1, (groups, -1)))
        return dx, None, dweight, None


def _convolve(x: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    groups = len(weight)
    if groups == 1:
        return gather(x, rows).flatten(1) @ weight[0].flatten(0, 1)
    columns = gather(x, rows).unflatten(2, (groups, -1))  # [M, K, G, C / G]
    return torch.einsum("mkgi,gkio->mgo", columns, weight).flatten(1)


class OctreeGroupNorm(nn.Module):
    """Group norm over the nodes of a sample: the mean and variance of a group of channels are taken over all nodes of its own sample.

    Args:
        channels: divided into `groups`, or into fewer where a group would have less than 4 channels.
    """

    def __init__(self, channels: int, groups: int = 32, eps: float = 1e-5):
        super().__init__()
        self.groups = min(groups, max(1, channels // _LEAST_GROUP))
        if channels % self.groups:
            raise ValueError(f"{channels} channels are not divisible into {self.groups} groups")
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, samples: Tensor, batch_size: int) -> Tensor:
        """x [M, C] of nodes that belong to `samples` [M] in 0 .. batch_size - 1."""
        return _Normalise.apply(x, self.weight, self.bias, samples, batch_size, self.groups, self.eps)


class _Normalise(torch.autograd.Function):
    """Group norm with its gradient in closed form: one tensor of the size of x is kept, and nothing of that size is made twice."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        samples: Tensor,
        batch_size: int,
        groups: int,
        eps: float,
    ) -> Tensor:
        count = torch.bincount(samples, minlength=batch_size).to(x.dtype)[:, None] * (x.shape[1] // groups) + eps
        mean = _mean_of_groups(_sum_of_samples(x, samples, batch_size), count, groups)
        y = x - mean.index_select(0, samples)
        square = _mean_of_groups(_sum_of_samples(y.square(), samples, batch_size), count, groups)
        scale = (square + eps).rsqrt()
        y *= scale.index_select(0, samples)
        ctx.save_for_backward(y, weight, samples, scale, count)
        ctx.groups = groups
        return torch.addcmul(bias, y, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, samples, scale, count = ctx.saved_tensors
        total = _sum_of_samples(dy, samples, len(count))  # [B, C]
        along = _sum_of_samples(dy * y, samples, len(count))
        mean = _mean_of_groups(total * weight, count, ctx.groups) * scale
        slope = _mean_of_groups(along * weight, count, ctx.groups) * scale
        dx = dy * (weight * scale).index_select(0, samples) - mean.index_select(0, samples)
        dx.addcmul_(y, slope.index_select(0, samples), value=-1)
        return dx, along.sum(0), total.sum(0), None, None, None, None


def _sum_of_samples(x: Tensor, samples: Tensor, batch_size: int) -> Tensor:
    """[M, C] -> [B, C]."""
    return x.new_zeros(batch_size, x.shape[1]).index_add_(0, samples, x)


def _mean_of_groups(total: Tensor, count: Tensor, groups: int) -> Tensor:
    """Sums [B, C] -> means over the channels of each group, one for every channel [B, C]."""
    size = total.shape[1] // groups
    return (total.unflatten(1, (groups, size)).sum(2) / count).repeat_interleave(size, 1)
