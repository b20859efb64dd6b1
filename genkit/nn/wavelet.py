"""Two levels of the Haar transform on tokens of a grid, every band split again: a full wavelet packet of 16 bands, as DiMSUM (NeurIPS 2024) uses it.

On a 2x2 cell [p q; r s] the orthonormal bands are LL = (p+q+r+s)/2, LH = (p+q-r-s)/2 (differences down), HL = (p-q+r-s)/2 (differences across) and
HH = (p-q-r+s)/2. Both levels together turn the 16 tokens of a 4x4 cell into band beta = 4 s1 + s2, s1 the band of the first level, s2 of the second.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from genkit.errors import UsageError

SIDE = 4  # tokens per side of a cell
BandLayout = Literal["release", "bands"]


def haar_packet(x: Tensor, grid: tuple[int, int], layout: BandLayout = "release") -> Tensor:
    """Tokens x [B, N, C] of a grid (Y, X) -> bands divided by 4, as many tokens of the same width.

    Args:
        layout: what the 16 tokens of a cell hold. "bands": token 4 p + q is band 4 p + q. "release": band beta is in features beta C / 16 and on of
            every token, and token 4 p + q holds the channels that leave the remainder 4 p + q when divided by 16; so all tokens see all bands, and the
            weights that were released fit.

    Raises: UsageError for a grid whose sides 4 does not divide.
    """
    bands = torch.matmul(packet_matrix(x.device).to(x.dtype) / SIDE, _cells(x, grid))  # [B, n, 16, C]
    if layout == "release":
        B, n, _, C = bands.shape
        bands = bands.reshape(B, n, C, SIDE**2).transpose(2, 3)
    return _tokens(bands, grid)


def inverse_haar_packet(x: Tensor, grid: tuple[int, int], layout: BandLayout = "release") -> Tensor:
    """Inverse of haar_packet."""
    bands = _cells(x, grid)
    if layout == "release":
        B, n, _, C = bands.shape
        bands = bands.transpose(2, 3).reshape(B, n, SIDE**2, C)
    return _tokens(torch.matmul(packet_matrix(x.device).to(x.dtype).T * SIDE, bands), grid)


@lru_cache(maxsize=8)
def packet_matrix(device: torch.device | str = "cpu") -> Tensor:
    """[16, 16] float32, orthonormal: rows are bands, columns the tokens of a cell in row-major order."""
    with torch.inference_mode(False):
        haar = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]], device=device) / 2
        first = haar.view(4, 1, 1, 2, 1, 2)  # s1, within the 2x2 cell
        second = haar.view(1, 4, 2, 1, 2, 1)  # s2, between 2x2 cells
        return (first * second).reshape(SIDE**2, SIDE**2)


def _cells(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, N, C] -> [B, N / 16, 16, C]."""
    B, _, C = x.shape
    Y, X = grid
    if Y % SIDE or X % SIDE:
        raise UsageError(f"a wavelet packet needs a grid of tokens whose sides are multiples of {SIDE}, found {Y}x{X}")
    cells = x.view(B, Y // SIDE, SIDE, X // SIDE, SIDE, C).transpose(2, 3)
    return cells.reshape(B, -1, SIDE**2, C)


def _tokens(cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """Inverse of _cells."""
    B, _, _, C = cells.shape
    Y, X = grid
    return cells.reshape(B, Y // SIDE, X // SIDE, SIDE, SIDE, C).transpose(2, 3).reshape(B, Y * X, C)
