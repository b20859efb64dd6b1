"""Positions of linear attention: MD-LRPE and MD-TPE."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.nn.layout import dense_layout
from genkit.nn.lrpe import FLAVOURS, lrpe, lrpe_angles, lrpe_factors
from genkit.nn.rope import turn_pairs
from genkit.nn.tpe import ToeplitzPositions


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("grid", [(6,), (4, 5), (3, 4, 2)])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_products_depend_on_distance_alone(flavour, grid):
    coords = dense_layout(grid).coords
    q, k = random(2, 1, coords.shape[1], 2, 12).unbind()
    shift = torch.tensor([3.0, 5.0, 2.0][: len(grid)])

    def products(coords: Tensor) -> Tensor:
        angles = lrpe_angles(coords, 12, flavour).double()
        return torch.einsum("bnhk,bmhk->bhnm", lrpe(q, angles, flavour), lrpe(k, angles, flavour))

    torch.testing.assert_close(products(coords), products(coords + shift), atol=1e-5, rtol=1e-5)
    moved = torch.cat([coords[:, :1] + shift, coords[:, 1:]], dim=1)
    assert (products(coords) - products(moved)).abs().max() > 0.1


def test_cosine_is_a_sum_of_cosines():
    coords = dense_layout((3, 4)).coords
    q, k = random(2, 1, 12, 1, 6).unbind()
    angles = lrpe_angles(coords, 6, "cosine").double()
    found = torch.einsum("bnhk,bmhk->nm", lrpe(q, angles, "cosine"), lrpe(k, angles, "cosine"))
    theta = 10_000.0 ** (-2 * torch.arange(3, dtype=torch.float64) / 6).repeat(2)
    axis = torch.tensor([0, 0, 0, 1, 1, 1])
    gap = (coords[0, :, None] - coords[0, None])[..., axis]  # [N, N, 6]
    expected = (q[0, :, None, 0] * k[0, None, :, 0] * (theta * gap).cos()).sum(-1)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_factors_give_the_products_of_turned_keys(flavour):
    angles = lrpe_angles(dense_layout((3, 4)).coords, 8, flavour).double()
    q, w = random(2, 1, 12, 3, 8).unbind()
    r, f = lrpe_factors(q, angles, flavour)
    found = torch.einsum("bnhk,bmhk->bhnm", r, f * torch.cat([w, w], dim=-1))
    expected = torch.einsum("bnhk,bmhk->bhnm", lrpe(q, angles, flavour), lrpe(w, angles, flavour))
    torch.testing.assert_close(found, expected)


def test_heads_too_narrow_are_refused():
    coords = dense_layout((2, 2, 2)).coords
    with pytest.raises(UsageError, match="even"):
        lrpe_angles(coords, 7, "rotary")
    with pytest.raises(UsageError, match="each of 3 axes"):
        lrpe_angles(coords, 4, "rotary")


@pytest.mark.parametrize("grid", [(7, 5), (1, 6), (1, 1)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_toeplitz_positions_equal_their_matrices(grid, is_causal):
    torch.manual_seed(0)
    positions = ToeplitzPositions(dim=3, is_causal=is_causal).double()
    x = random(2, grid[0] * grid[1], 3)
    image, expected = x.unflatten(1, grid), torch.zeros(2, *grid, 3, dtype=torch.float64)
    for axis, length in enumerate(grid):
        matrix = torch.zeros(length, length, 3, dtype=torch.float64)
        for i in range(length):
            for j in range(length):
                if i >= j or not is_causal:
                    side = 0 if i >= j else 1
                    decay = positions.logit[axis, side].sigmoid() ** abs(i - j)
                    matrix[i, j] = (positions.weight[axis, side] * decay).sum(-1)
        expected += torch.einsum("ijd,bjxd->bixd" if axis == 0 else "ijd,byjd->byid", matrix, image)
    torch.testing.assert_close(positions(x, grid), expected.flatten(1, 2))


def test_toeplitz_positions_tell_places_apart():
    torch.manual_seed(0)
    x = torch.ones(1, 12, 4)
    assert torch.pdist(ToeplitzPositions(dim=4)(x, (3, 4))[0]).min() > 1e-3
    with pytest.raises(UsageError, match="2 axes on the grid"):
        ToeplitzPositions(dim=4)(x, (12,))


def test_pairs_are_turned_by_their_angles_compiled_or_not():
    x, angles = random(3, 5, 2, 8), random(5, 1, 4)
    by_hand = torch.stack(
        [torch.stack([angles.cos(), -angles.sin()], -1), torch.stack([angles.sin(), angles.cos()], -1)], -2
    )
    expected = torch.einsum("...pij,...pj->...pi", by_hand, x.unflatten(-1, (4, 2))).flatten(-2)
    compiled = torch.compile(turn_pairs, fullgraph=True, backend="eager")
    for turn in (turn_pairs, compiled):
        torch.testing.assert_close(turn(x, angles), expected)
        assert turn(x.bfloat16(), angles).dtype == torch.bfloat16
        assert torch.autograd.gradcheck(turn, (x.requires_grad_(), angles.requires_grad_()))
