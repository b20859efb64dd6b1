"""Ids of varying density as a sequence of pairs: where, and what; coarse ones first.

Huang et al., "Towards Accurate Image Coding: Improved Autoregressive Image Generation with Dynamic Vector Quantization" (DQ-Transformer), CVPR 2023,
section 3.3; behaviour of the permuter in CrossmodalGroup/DynamicVectorQuantization. Differences: the codes of a region come together (their
"region-first"); the end of a grain is also the start of the next, so that nothing is padded between them; only what can still complete the image
is allowed: regions in rising order that no coarser grain has coded, and an end only when finer grains can do the rest.

Grains are numbered from 0, the coarsest; see genkit.nn.grain. A position is the number of a cell on the grid of its grain, the cells of the regions in
order and within a region in row order; all grains in a row, each with one more number for its end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.nn import grain as grains


@dataclass(frozen=True)
class Progress:
    """How far sequences are. Every entry has the same leading axes `...`."""

    covered: Tensor  # [..., R] bool: regions that are coded, or begun
    grain: Tensor  # [...] int64, num_grains = over
    region: Tensor  # [...] int64, the last one, -1 at the start of a grain
    filled: Tensor  # [...] int64, codes that region has so far

    def first(self, count: int) -> Progress:
        """The first `count` along the second axis."""
        parts = (y[:, :count] for y in (self.covered, self.grain, self.region, self.filled))
        return Progress(*parts)


class GrainSequence:
    """The sequences of images on a fine grid (Y, X).

    Attributes:
        num_positions: P, how many numbers positions have.
        length: L, pairs of the longest sequence: everything fine, and an end of each grain.

    Raises: UsageError for a grid that regions do not fill.
    """

    def __init__(self, grid: tuple[int, ...], num_grains: int):
        side = 2 ** (num_grains - 1)
        if len(grid) != 2 or any(cells % side for cells in grid):
            raise UsageError(f"a grid of {list(grid)} is not filled by regions of {side}x{side} cells")
        self.grid, self.num_grains, self.side = tuple(grid), num_grains, side
        self.regions = (grid[0] // side) * (grid[1] // side)  # R
        self.counts = [4**g for g in range(num_grains)]  # codes of a region
        areas = [self.regions * count + 1 for count in self.counts]
        self.first = [sum(areas[:g]) for g in range(num_grains)]  # position of the first cell of each grain
        self.num_positions = sum(areas)
        self.length = self.regions * self.counts[-1] + num_grains
        self.ends = [self.first[g] + areas[g] - 1 for g in range(num_grains)]
        # Of every position: its grain, its region (-1 for an end), the number of the cell in its region, and the fine cell it begins at.
        grain = torch.cat([torch.full((area,), g) for g, area in enumerate(areas)])
        within = torch.cat([torch.arange(area) for area in areas])
        is_end = torch.zeros(self.num_positions, dtype=torch.bool)
        is_end[self.ends] = True
        count = torch.tensor(self.counts)[grain]
        region, cell = within // count, within % count
        per_side = 2**grain
        row, column = cell // per_side, cell % per_side
        wide = self.side // per_side  # fine cells along a side of the square
        columns = grid[1] // side
        y, x = region // columns * side + row * wide, region % columns * side + column * wide
        self.grain, self.region = grain, region.masked_fill(is_end, -1)
        self.cell, self.fine = cell, (y * grid[1] + x).masked_fill(is_end, 0)

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids [B, 1, Y, X] on the fine grid -> (positions [B, n], contents [B, n] int64), n pairs of the longest image; -1 behind the end.

        The content of an end is -1. A region is coded as coarsely as its ids allow.
        """
        B, device = len(ids), ids.device
        map_ = grains.grain_of(ids[:, 0], self.num_grains).flatten(1)  # [B, R]
        grain, region, fine = (y.to(device) for y in (self.grain, self.region, self.fine))
        is_end = region < 0
        used = is_end | (map_[:, region.clamp_min(0)] == grain)  # [B, P]; positions are in the order of drawing already
        image, position = used.nonzero(as_tuple=True)
        lengths = used.sum(1)
        place = torch.arange(len(image), device=device) - (lengths.cumsum(0) - lengths)[image]
        positions = torch.full((B, int(lengths.max())), -1, device=device)
        contents = positions.clone()
        positions[image, place] = position
        found = ids.flatten(1)[image, fine[position]]
        contents[image, place] = torch.where(is_end[position], -1, found)
        return positions, contents

    def decode(self, positions: Tensor, contents: Tensor) -> Tensor:
        """The inverse: [B, n] each -> ids [B, 1, Y, X], -1 where nothing was coded."""
        B, device = len(positions), positions.device
        grain, region, fine = (y.to(device) for y in (self.grain, self.region, self.fine))
        known = positions.clamp_min(0)
        is_code = (positions >= 0) & (region[known] >= 0)
        image, place = is_code.nonzero(as_tuple=True)
        position = positions[image, place]
        ids = torch.full((B, self.grid[0] * self.grid[1]), -1, device=device)
        ids[image, fine[position]] = contents[image, place]
        map_ = torch.full((B, self.regions), self.num_grains - 1, device=device)
        map_[image, region[position]] = grain[position]
        map_ = map_.view(B, self.grid[0] // self.side, self.grid[1] // self.side)
        wide = grains.expand(2 ** (self.num_grains - 1 - map_), self.side)
        return grains.spread(ids.view(B, *self.grid), wide)[:, None]

    def progress(self, positions: Tensor) -> Progress:
        """How far a sequence is before each of its pairs and behind the last: positions [B, n] -> leading axes [B, n + 1]."""
        B, n = positions.shape
        device = positions.device
        region, cell = self.region.to(device), self.cell.to(device)
        known = positions.clamp_min(0)
        of_pair = region[known].masked_fill(positions < 0, -1)  # [B, n]
        is_end = (of_pair < 0) & (positions >= 0)
        hit = torch.zeros(B, n + 1, self.regions, dtype=torch.int8, device=device)
        where = (of_pair >= 0).nonzero(as_tuple=True)
        hit[where[0], where[1] + 1, of_pair[where]] = 1
        covered = hit.cummax(1).values.bool()
        front = torch.zeros(B, 1, dtype=torch.int64, device=device)
        over = torch.cat([front, is_end.long()], dim=1).cumsum(1).clamp_max(self.num_grains)
        last = torch.cat([front - 1, of_pair], dim=1)
        filled = torch.cat([front, torch.where(of_pair >= 0, cell[known] + 1, 0)], dim=1)
        return Progress(covered, over, last, filled)

    def allowed(self, at: Progress) -> Tensor:
        """Which positions may come next, [..., P] bool. Where a sequence is over, its last end, which says nothing more."""
        device = at.grain.device
        grain, region, cell = (y.to(device) for y in (self.grain, self.region, self.cell))
        is_end = region < 0
        now = at.grain.unsqueeze(-1)
        of_region = at.covered[..., region.clamp_min(0)]  # [..., P]
        count = torch.tensor([*self.counts, 0], device=device)[at.grain]
        inside = ((at.filled > 0) & (at.filled < count)).unsqueeze(-1)
        last = self.num_grains - 1
        whole = at.covered.all(-1, keepdim=True)
        begins = ~is_end & (cell == 0) & ~of_region & (region > at.region.unsqueeze(-1))
        # The finest grain has to code all that is left, so its regions follow without a gap.
        left = ~at.covered
        next_left = torch.where(whole, -1, left.int().argmax(-1, keepdim=True))
        begins = begins & ((now < last) | (region == next_left))
        goes_on = (region == at.region.unsqueeze(-1)) & (cell == at.filled.unsqueeze(-1)) & ~is_end
        ends = is_end & ((now < last) | whole)
        free = (grain == now) & torch.where(inside, goes_on, begins | ends)
        done = (now > last) & is_end & (grain == last)
        return free | done
