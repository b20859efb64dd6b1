"""The structure of a batch of octrees: keys, children and neighbours of every depth. No learning, no loop over nodes.

Wang et al., "O-CNN: Octree-based Convolutional Neural Networks", 2017; numbering and rules as in `octree-nn/ocnn-pytorch` 2.3.3 (MIT), which the tests
compare with. What differs: several clouds are built into one batch at once, neighbours are made when they are asked for, and nothing is repaired in
silence.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from genkit.kernels.octree_neighbours.op import octree_neighbours
from genkit.octree import keys as zorder

_MOST_PLACES = 2**25  # of a table of all places in space

# Which of a 3x3x3 neighbourhood, dz fastest, a smaller kernel has.
KERNELS = {
    "333": None,
    "222": (13, 14, 16, 17, 22, 23, 25, 26),
    "311": (4, 13, 22),
    "131": (10, 13, 16),
    "113": (12, 13, 14),
    "331": (1, 4, 7, 10, 13, 16, 19, 22, 25),
    "313": (3, 4, 5, 12, 13, 14, 21, 22, 23),
    "133": (9, 10, 11, 12, 13, 14, 15, 16, 17),
}


@dataclass
class Octree:
    """B octrees as one: nodes of all samples stand one after another, each depth sorted by (sample, key), which is z-order.

    Depths 0 .. full_depth are complete grids. Deeper ones hold the 8 children of every node that is not empty, so that empty nodes are there too, always
    in groups of 8 siblings. A node is split exactly when it is not empty; at the deepest depth "split" means occupied.

    Attributes:
        depth: of the finest nodes.
        full_depth: down to which every sample is a complete grid.
        batch_size: B.
        keys: per depth, [M_d] int64, see genkit.octree.keys.
        children: per depth, [M_d] int64: number of the node among those of its depth that are not empty, or -1. Its children are
            8 children .. 8 children + 7 of the next depth.
        points: [P, 3], mean point of every occupied node of the finest depth, in units of a node from the corner of the box, 0 .. 2^depth; None if the
            octree was not built from points. normals [P, 3] (length 1) and features [P, C] likewise.
    """

    depth: int
    full_depth: int
    batch_size: int
    keys: list[Tensor]
    children: list[Tensor]
    points: Tensor | None = None
    normals: Tensor | None = None
    features: Tensor | None = None
    _kept: dict[tuple[str, int], Tensor] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    def count(self, depth: int) -> int:
        """Nodes of a depth, M_d."""
        return len(self.keys[depth])

    def count_occupied(self, depth: int) -> int:
        """Nodes of a depth that are not empty."""
        return self.count(depth) if depth < self.full_depth else len(self.occupied(depth))

    def is_occupied(self, depth: int) -> Tensor:
        """[M_d] bool."""
        return self.children[depth] >= 0

    def occupied(self, depth: int) -> Tensor:
        """Numbers of the nodes that are not empty, [.] int64, rising."""
        return self._keep("occupied", depth, lambda: self.is_occupied(depth).nonzero().squeeze(1))

    def xyz(self, depth: int) -> Tensor:
        """[M_d, 3] int64 in [0, 2^depth)."""
        return self._keep("xyz", depth, lambda: zorder.decode(self.keys[depth])[0])

    def samples(self, depth: int) -> Tensor:
        """[M_d] int64, the sample each node belongs to."""
        return self._keep("samples", depth, lambda: zorder.sample(self.keys[depth]))

    def counts_of_samples(self, depth: int) -> Tensor:
        """[B] int64, nodes of a depth per sample."""
        return torch.bincount(self.samples(depth), minlength=self.batch_size)

    def neighbours(self, depth: int) -> Tensor:
        """[M_d, 27] int64: numbers of the 3x3x3 nodes around each node, dz fastest, itself in the middle (13); -1 = there is none."""
        return self._keep("neighbours", depth, lambda: self._neighbours(depth))

    def neighbours_of(self, depth: int, kernel: str = "333", stride: int = 1, is_dense: bool = True) -> Tensor:
        """Part of the neighbours.

        Args:
            kernel: sides of the neighbourhood, a key of KERNELS.
            stride: 2 = only around the first of 8 siblings, one row per occupied parent.
            is_dense: False counts occupied nodes alone, in rows (stride 1) and in what the numbers mean.

        Raises: ValueError for an unknown kernel or stride.
        """
        if kernel not in KERNELS or stride not in (1, 2):
            raise ValueError(f"kernel {kernel} and stride {stride}: known are {', '.join(KERNELS)} with stride 1 or 2")
        rows = self.neighbours(depth)
        if stride == 2:
            rows = rows[::8]
        elif not is_dense:
            rows = rows[self.occupied(depth)]
        if KERNELS[kernel] is not None:
            rows = rows[:, list(KERNELS[kernel] or ())]
        if is_dense:
            return rows
        return torch.where(rows >= 0, self.children[depth][rows.clamp_min(0)], -1)

    def search(self, xyz: Tensor, samples: Tensor, depth: int, is_dense: bool = True) -> Tensor:
        """Numbers [P] int64 of the nodes at integer coordinates; -1 = no node there, or outside the box.

        Args:
            xyz: [P, 3], in units of a node; fractions are cut off.
            samples: [P] int64.
            is_dense: False searches occupied nodes alone and numbers them.
        """
        place = xyz.floor().long() if xyz.is_floating_point() else xyz.long()
        is_inside = ((place >= 0) & (place < 1 << depth)).all(-1) & (samples >= 0) & (samples < self.batch_size)
        found = self.find(zorder.encode(place.clamp(0, (1 << depth) - 1), samples), depth, is_dense)
        return torch.where(is_inside, found, -1)

    def raster(self, depth: int, margin: int) -> Tensor | None:
        """Numbers of the nodes laid out in space, [batch, 2^depth + 2 margin, .., ..] int32, -1 where there is none: a search is then one look-up. None where
        that would take more than 128 MiB.
        """
        side = (1 << depth) + 2 * margin
        if self.batch_size * side**3 > _MOST_PLACES:
            return None

        def make() -> Tensor:
            table = torch.full((self.batch_size, side, side, side), -1, dtype=torch.int32, device=self.device)
            x, y, z = (self.xyz(depth) + margin).unbind(1)
            table[self.samples(depth), x, y, z] = torch.arange(self.count(depth), dtype=torch.int32, device=self.device)
            return table

        return self._keep(f"raster {margin}", depth, make)

    def find(self, key: Tensor, depth: int, is_dense: bool = True) -> Tensor:
        """Numbers of the nodes with these keys, -1 where there is none."""
        if depth <= self.full_depth and is_dense:  # a complete grid: the key is the number
            number = (zorder.sample(key) << 3 * depth) + zorder.place(key)
            return torch.where(zorder.sample(key) < self.batch_size, number, -1)
        own = self.keys[depth] if is_dense else self.keys[depth][self.occupied(depth)]
        if not len(own):
            return torch.full_like(key, -1)
        number = torch.searchsorted(own, key).clamp_max(len(own) - 1)
        return torch.where(own[number] == key, number, -1)

    def to(self, device: torch.device | str) -> Octree:
        """The same octrees on another device."""

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        return Octree(
            self.depth,
            self.full_depth,
            self.batch_size,
            [x.to(device) for x in self.keys],
            [x.to(device) for x in self.children],
            move(self.points),
            move(self.normals),
            move(self.features),
            {name: x.to(device) for name, x in self._kept.items()},
        )

    def _keep(self, name: str, depth: int, make: object) -> Tensor:
        if (name, depth) not in self._kept:
            with torch.inference_mode(False), torch.no_grad():
                self._kept[name, depth] = make()  # type: ignore[operator]
        return self._kept[name, depth]

    def _neighbours(self, depth: int) -> Tensor:
        if depth <= self.full_depth:
            return self._neighbours_in_grid(depth)
        parents = self.neighbours(depth - 1).index_select(0, self.occupied(depth - 1))  # [P, 27]
        return octree_neighbours(parents, self.children[depth - 1])

    def _neighbours_in_grid(self, depth: int) -> Tensor:
        xyz, samples = self.xyz(depth)[:, None], self.samples(depth)[:, None]
        offsets = torch.cartesian_prod(*[torch.arange(-1, 2, device=self.device)] * 3)  # [27, 3]
        return self.search((xyz + offsets).flatten(0, 1), samples.expand(-1, 27).flatten(), depth).view(-1, 27)
