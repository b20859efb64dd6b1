"""Any mixer that follows the order of tokens, run along other orders of the grid: one per layer, or several at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from genkit.errors import UsageError
from genkit.interfaces import Cache, Layout
from genkit.mixers.grids import grid_of
from genkit.nn.scan_orders import SCHEDULES, check, scan_order, schedule
from genkit.registry import MixerSpec, maker

GLA: MixerSpec = {"type": "gla"}


class MultiScan(nn.Module):
    """sum over the orders of put_back(mixer(visit(x))): `[raster, reversed-raster]` with "sum" makes a causal mixer see both ways.

    The mixer inside gets coordinates and padding in the order of visiting and no grid; one that needs a grid is refused.

    Args:
        mixer: what runs along the order.
        orders: names of nn/scan_orders.py, or of a schedule.
        combine: "cycle" layer i follows order i alone; "sum" every layer follows all, each with weights of its own, or
            "share" with the same.
    """

    is_causal = False
    needs_grid = True  # padded or not, when the mixer inside takes padding

    def __init__(
        self,
        *,
        dim: int,
        layer: int,
        mixer: MixerSpec = GLA,
        orders: str | list[str] = "sweep-4",
        combine: Literal["cycle", "sum", "share"] = "cycle",
    ):
        super().__init__()
        if combine not in ("cycle", "sum", "share"):
            raise UsageError(f"mixer.combine={combine!r} must be cycle, sum or share")
        self.orders = [schedule(orders, layer)]
        if combine != "cycle":
            named = [orders] if isinstance(orders, str) else orders
            self.orders = [check(order) for name in named for order in SCHEDULES.get(name, (name,))]
        make = maker("mixer", mixer)
        count = len(self.orders) if combine == "sum" else 1
        self.mixers = nn.ModuleList(make(dim=dim, layer=layer) for _ in range(count))
        if any(inner.needs_grid for inner in self.mixers):
            raise UsageError("mixer.type=multi_scan: the mixer inside works on a grid and follows no order of tokens")
        self.is_resolution_free = all(bool(inner.is_resolution_free) for inner in self.mixers)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        grid = grid_of(layout, "multi_scan")
        out = torch.zeros_like(x)
        for i, name in enumerate(self.orders):
            order = scan_order(name, grid, x.device)
            valid = None if layout.valid is None else order.visit(layout.valid)
            along = replace(layout, coords=order.visit(layout.coords), grid=None, valid=valid)
            out = out + order.put_back(self.mixers[i % len(self.mixers)](order.visit(x), along))
        return out
