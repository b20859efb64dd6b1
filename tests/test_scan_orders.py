"""Scan orders of grids: permutations, and the ones their names promise."""

from __future__ import annotations

import math

import pytest
import torch

from genkit.errors import UsageError
from genkit.nn.scan_orders import ORDERS, SCHEDULES, scan_order, schedule

GRIDS = [(1, 1), (7, 5), (5, 7), (8, 8), (1, 6), (6, 1), (3, 9), (16, 2), (31, 17), (2, 3, 4), (3, 1, 5)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", [*ORDERS, *(f"reversed-{name}" for name in ORDERS)])
def test_every_order_is_a_permutation_with_its_inverse(name, grid):
    order, N = scan_order(name, grid), math.prod(grid)
    assert torch.equal(order.index.sort().values, torch.arange(N))
    assert torch.equal(order.index[order.inverse], torch.arange(N))
    x = torch.randn(2, N, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(order.put_back(order.visit(x)), x)
    assert torch.equal(order.visit(x)[:, 0], x[:, order.index[0]])
    assert order.is_raster == torch.equal(order.index, torch.arange(N))


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if len(grid) == 2] + [(14, 14), (16, 16), (9, 20), (6, 4)])
@pytest.mark.parametrize("name", ["hilbert", "zigzag", *SCHEDULES["zigzag-8"]])
def test_curves_step_to_a_neighbour(name, grid):
    index = scan_order(name, grid).index
    steps = (index // grid[1]).diff().abs() + (index % grid[1]).diff().abs()
    assert (steps == 1).all()


@pytest.mark.parametrize("name", ["hilbert", "zigzag"])
def test_curves_through_volumes_step_to_a_neighbour(name):
    for grid in ((3, 4, 4), (2, 5, 3)):
        index = scan_order(name, grid).index
        places = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1).flatten(0, -2)[index]
        assert (places.diff(dim=0).abs().sum(-1) == 1).all(), grid


def test_hilbert_keeps_neighbours_near():
    """The squared distance of two places is at most 6 times their distance along the curve (a raster's is up to 15 times)."""

    def stretch(name: str) -> float:
        index = scan_order(name, (16, 16)).index
        places = torch.stack([index // 16, index % 16], -1).float()
        apart = torch.arange(256, dtype=torch.float32)
        gap = (apart[:, None] - apart).abs().clamp_min(1)
        return (torch.cdist(places, places).square() / gap).max().item()

    assert stretch("hilbert") <= 6
    assert stretch("zigzag") > 14


def test_orders_by_hand():
    def order(name: str) -> list[int]:
        return scan_order(name, (2, 3)).index.tolist()

    assert order("raster") == order("sweep-0") == [0, 1, 2, 3, 4, 5]
    assert order("column") == order("sweep-4") == [0, 3, 1, 4, 2, 5]
    assert order("reversed-column") == [5, 2, 4, 1, 3, 0]
    assert order("zigzag") == order("zigzag-0") == [0, 1, 2, 5, 4, 3]
    assert order("sweep-1") == [2, 1, 0, 5, 4, 3]
    assert order("sweep-2") == [3, 4, 5, 0, 1, 2]
    assert order("sweep-3") == order("reversed-raster") == [5, 4, 3, 2, 1, 0]
    assert order("zigzag-6") == [3, 0, 1, 4, 5, 2]
    assert order("zigzag-5") == [2, 5, 4, 1, 0, 3]


def test_the_eight_of_a_schedule_differ():
    for name in ("sweep-8", "zigzag-8"):
        assert len({tuple(scan_order(schedule(name, i), (4, 3)).index.tolist()) for i in range(8)}) == 8


def test_schedules_go_through_the_layers():
    assert [schedule("sweep-4", i) for i in range(5)] == [*SCHEDULES["sweep-4"], "raster"]
    assert [schedule(["hilbert", "sweep-4"], i) for i in (0, 1, 4, 5)] == [
        "hilbert",
        "raster",
        "reversed-column",
        "hilbert",
    ]
    assert schedule("column", 7) == "column"


def test_orders_are_made_once():
    assert scan_order("hilbert", (9, 9)) is scan_order("hilbert", (9, 9))
    with torch.inference_mode():
        order = scan_order("hilbert", (9, 11))
    assert not order.index.is_inference()


def test_what_does_not_exist_is_refused():
    with pytest.raises(UsageError, match="did you mean 'hilbert'"):
        schedule("hilbrt", 0)
    with pytest.raises(UsageError, match="two axes"):
        scan_order("column", (5,))
    with pytest.raises(UsageError, match="empty"):
        schedule([], 0)
