"""Networks on the dual graph of an octree: leaves of all depths exchange features across their faces (Wang et al., "Dual Octree Graph Networks", 2022).

Layers and their layout as in `octree-nn/ognn-pytorch ognn/nn.py` (MIT), so that its weights fit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.utils.checkpoint import checkpoint

from genkit.nn.octree_conv import OctreeGroupNorm
from genkit.octree.graph import EDGES, DualGraph
from genkit.octree.octree import Octree

_GROUPS = 32


class GraphConv(nn.Module):
    """y_i = [mean of the neighbours across each of six faces, x_i] W, every feature with the depth of its node beside it.

    Args:
        num_depths: depths a node can have, as one-hot channels; 0 or 1 = none.
    """

    def __init__(self, in_channels: int, out_channels: int, num_depths: int):
        super().__init__()
        self.num_depths = num_depths if num_depths > 1 else 0
        self.weight = nn.Parameter(torch.empty(EDGES * (in_channels + self.num_depths), out_channels))
        reach = math.sqrt(6 / (EDGES * (in_channels + out_channels)))
        nn.init.uniform_(self.weight, -reach, reach)

    def forward(self, x: Tensor, graph: DualGraph) -> Tensor:
        if self.num_depths:
            x = torch.cat([x, one_hot(graph.depths, self.num_depths).to(x.dtype)], 1)
        return _GraphConvolve.apply(x, self.weight, graph)


class _GraphConvolve(torch.autograd.Function):
    """Columns are gathered again for the gradient and never kept.

    Edges are mutual: j across face f of i has i across the opposite face. The gradient of x is a convolution of dy as well, with the faces turned around;
    only the shares of a mean are those of the other end.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, graph: DualGraph) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.graph = graph
        return _columns(x, graph) @ weight

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        graph: DualGraph = ctx.graph
        dx = dweight = None
        if ctx.needs_input_grad[1]:
            dweight = _columns(x, graph).T @ dy
        if ctx.needs_input_grad[0]:
            turned = weight.unflatten(0, (EDGES, -1)).mT[_OPPOSITE]  # [7, C_out, C_in]
            dx = _columns(dy, graph, is_back=True) @ turned.flatten(0, 1)
        return dx, dweight, None


_OPPOSITE = [1, 0, 3, 2, 5, 4, 6]


def _columns(x: Tensor, graph: DualGraph, is_back: bool = False) -> Tensor:
    """[N, 7 C]: means over the neighbours across each face, then the vertex itself; is_back: sums of what each had to give to the mean of the other end."""
    beside = torch.cat([x, x.new_zeros(1, x.shape[1])])
    columns = beside.index_select(0, graph.rows)  # [N * 7, C]
    slot, target = graph.many
    if len(slot):
        several = x.index_select(0, target)
        columns.index_add_(0, slot, several if is_back else several.mul_(graph.share))
    if is_back and len(graph.coarse):
        columns[graph.coarse] *= graph.share_of_coarse
    return columns.view(len(x), -1)


class GraphNorm(nn.Module):
    """Group norm over the vertices of a sample."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = OctreeGroupNorm(channels, _GROUPS)

    def forward(self, x: Tensor, graph: DualGraph) -> Tensor:
        return self.norm(x, graph.samples, graph.batch_size)


class Linear(nn.Module):
    """A linear layer, a norm, and a ReLU where `is_active`."""

    def __init__(self, in_channels: int, out_channels: int, is_active: bool = True):
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels, bias=False)
        self.norm = GraphNorm(out_channels)
        self.is_active = is_active

    def forward(self, x: Tensor, graph: DualGraph) -> Tensor:
        y = self.norm(self.linear(x), graph)
        return y.relu() if self.is_active else y


class Block(nn.Module):
    """Two graph convolutions with norms around a residual; the inner one has 1 / bottleneck of the channels."""

    def __init__(self, in_channels: int, out_channels: int, num_depths: int, bottleneck: int = 1):
        super().__init__()
        middle = out_channels // bottleneck
        self.conv1 = GraphConv(in_channels, middle, num_depths)
        self.norm1 = GraphNorm(middle)
        self.conv2 = GraphConv(middle, out_channels, num_depths)
        self.norm2 = GraphNorm(out_channels)
        self.shortcut = Linear(in_channels, out_channels, is_active=False) if in_channels != out_channels else None

    def forward(self, x: Tensor, graph: DualGraph) -> Tensor:
        y = self.norm1(self.conv1(x, graph), graph).relu()
        y = self.norm2(self.conv2(y, graph), graph)
        return (y + (x if self.shortcut is None else self.shortcut(x, graph))).relu()


class Blocks(nn.ModuleList):
    """Blocks of one depth."""

    is_checkpointed = False

    def __init__(self, channels: int, count: int, num_depths: int, bottleneck: int = 1):
        super().__init__(Block(channels, channels, num_depths, bottleneck) for _ in range(count))

    def forward(self, x: Tensor, graph: DualGraph) -> Tensor:
        for block in self:
            if self.is_checkpointed and torch.is_grad_enabled():
                x = checkpoint(block, x, graph, use_reentrant=False)
            else:
                x = block(x, graph)
        return x


class Down(nn.Module):
    """One depth up: eight siblings become their parent, leaves pass."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        # [in, in, 8] in the layout of the released weights, where the child is the fastest axis of what is multiplied.
        self.weight = nn.Parameter(torch.empty(in_channels, in_channels, 8))
        nn.init.xavier_uniform_(self.weight)
        self.linear = Linear(in_channels, out_channels) if in_channels != out_channels else None

    def forward(self, x: Tensor, octree: Octree, below: DualGraph, above: DualGraph) -> Tensor:
        leaves, nodes = x.tensor_split([below.num_leaves])
        d = above.depth
        joined = nodes.reshape(-1, 8 * x.shape[1]) @ self.weight.flatten(1).T
        out = x.new_zeros(octree.count(d), x.shape[1])
        is_split = octree.is_occupied(d)
        out = out.index_copy(0, octree.occupied(d), joined)
        out = out.index_copy(0, (~is_split).nonzero().squeeze(1), leaves[above.num_leaves :])
        y = torch.cat([leaves[: above.num_leaves], out])
        return y if self.linear is None else self.linear(y, above)


class Up(nn.Module):
    """One depth down: a split node becomes its eight children, leaves pass."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_channels, in_channels, 8))
        nn.init.xavier_uniform_(self.weight)
        self.linear = Linear(in_channels, out_channels) if in_channels != out_channels else None

    def forward(self, x: Tensor, octree: Octree, above: DualGraph, below: DualGraph) -> Tensor:
        leaves, nodes = x.tensor_split([above.num_leaves])
        d = above.depth
        kept = nodes.index_select(0, (~octree.is_occupied(d)).nonzero().squeeze(1))
        children = (nodes.index_select(0, octree.occupied(d)) @ self.weight.flatten(1)).view(-1, x.shape[1])
        y = torch.cat([leaves, kept, children])
        return y if self.linear is None else self.linear(y, below)


class Head(nn.Module):
    """Two layers to what is predicted of a vertex."""

    def __init__(self, in_channels: int, middle: int, out_channels: int):
        super().__init__()
        self.first = Linear(in_channels, middle)
        self.last = nn.Linear(middle, out_channels)

    def forward(self, x: Tensor, graph: DualGraph) -> Tensor:
        return self.last(self.first(x, graph))


def to_nodes(x: Tensor, graph: DualGraph) -> Tensor:
    """Values of the vertices [N, C] -> of all nodes of the depths full_depth .. depth [T, C], 0 at those that are split."""
    return x.new_zeros(len(graph.is_vertex), x.shape[1]).index_copy(0, graph.is_vertex.nonzero().squeeze(1), x)
