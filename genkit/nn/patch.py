"""Grids in patches and back, over any number of axes.

The rule of every backbone that patches. A caller knows no patch size: its layout speaks of the cells of x, and only `layout.valid` of it is read.
The backbone lays its own tokens out from the grid of x. A token is real where any of its cells is; sizes that are multiples of the patch leave
nothing in between. What comes out at padding is 0.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.interfaces import Layout
from genkit.nn.layout import dense_layout

PatchSize = int | tuple[int, ...]


def patch_sides(patch_size: PatchSize, num_axes: int) -> tuple[int, ...]:
    """Cells along every axis of a patch. Raises UsageError for one that is not positive, or too few or many."""
    sides = (patch_size,) * num_axes if isinstance(patch_size, int) else tuple(patch_size)
    if len(sides) != num_axes or min(sides) < 1:
        raise UsageError(
            f"patch_size={patch_size} does not fit a grid of {num_axes} axes; give one size, or one per axis"
        )
    return sides


def token_grid(grid: tuple[int, ...], sides: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens along every axis. Raises UsageError where a patch sticks out."""
    if len(grid) != len(sides) or any(length % side for length, side in zip(grid, sides, strict=True)):
        raise UsageError(
            f"a grid of {tuple(grid)} cannot be cut into patches of {sides}; each length must be a multiple"
        )
    return tuple(length // side for length, side in zip(grid, sides, strict=True))


def patchify(x: Tensor, sides: tuple[int, ...]) -> Tensor:
    """x [B, C, *grid] -> [B, N, C * prod(sides)]: tokens row-major; within a token the channel is slowest, as in a convolution's weight."""
    B, C, *grid = x.shape
    tokens, A = token_grid(tuple(grid), sides), len(sides)
    x = x.reshape(B, C, *(length for pair in zip(tokens, sides, strict=True) for length in pair))
    token_axes, cell_axes = [2 + 2 * a for a in range(A)], [3 + 2 * a for a in range(A)]
    return x.permute(0, *token_axes, 1, *cell_axes).reshape(B, math.prod(tokens), C * math.prod(sides))


def unpatchify(x: Tensor, tokens: tuple[int, ...], sides: tuple[int, ...]) -> Tensor:
    """Inverse of patchify: [B, N, C * prod(sides)] -> [B, C, *grid], N = prod(tokens)."""
    B, A = x.shape[0], len(sides)
    x = x.reshape(B, *tokens, -1, *sides)  # the channel stands at axis 1 + A
    interleaved = [axis for a in range(A) for axis in (1 + a, 2 + A + a)]
    return x.permute(0, 1 + A, *interleaved).reshape(
        B, -1, *(count * side for count, side in zip(tokens, sides, strict=True))
    )


def token_layout(x: Tensor, layout: Layout, sides: tuple[int, ...]) -> Layout:
    """The layout of x's patches: [1, N, A] coordinates in units of one token, and which tokens are real where layout.valid says so of cells.

    Raises UsageError for a `valid` that is not [B, cells].
    """
    B, _, *grid = x.shape
    laid_out = dense_layout(token_grid(tuple(grid), sides), device=x.device)
    if layout.valid is None:
        return laid_out
    if layout.valid.shape != (B, math.prod(grid)):
        raise UsageError(f"layout.valid is {list(layout.valid.shape)}, expected [{B}, {math.prod(grid)}]: one per cell")
    cells = patchify(layout.valid.view(B, 1, *grid), sides)  # [B, N, prod(sides)]
    return replace(laid_out, valid=cells.any(-1))


def real_only(tokens: Tensor, layout: Layout) -> Tensor:
    """tokens [B, N, D] with 0 at padding."""
    return tokens if layout.valid is None else torch.where(layout.valid.unsqueeze(-1), tokens, 0)
