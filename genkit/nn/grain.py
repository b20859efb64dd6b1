"""Maps of how finely each region of an image is coded, and ids packed to the codes that are really needed.

Huang et al., "Towards Accurate Image Coding: Improved Autoregressive Image Generation with Dynamic Vector Quantization" (DQ-VAE), CVPR 2023.

With G grains a region is a square of 2^(G-1) x 2^(G-1) cells of the fine grid. Grain 0 codes it by a single code, grain g by 4^g codes, each of which stands
for a square of 2^(G-1-g) cells a side. A grain map [B, Y / 2^(G-1), X / 2^(G-1)] int64 holds the grain of every region.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from genkit.errors import GenkitError

NUM_BINS = 32  # of the histogram of grey levels; H is at most ln 32 = 3.47 nats
SIGMA = 0.01  # width of the Gaussian each pixel is spread by, in units of the range [-1, 1]
GREY = (0.2989, 0.5870, 0.1140)  # shares of red, green and blue

Packed = list[
    tuple[Tensor, Tensor]
]  # for every image: positions [n] int64 on the fine grid (row-major), codes [n] int64


def expand(values: Tensor, times: int) -> Tensor:
    """[..., y, x] -> [..., times y, times x]: every entry becomes a square."""
    return values.repeat_interleave(times, dim=-2).repeat_interleave(times, dim=-1)


def entropy(x: Tensor, patch_size: int) -> Tensor:
    """Entropy of the grey levels of every patch, in nats: images [B, 1 or 3, Y, X] in [-1, 1] -> [B, Y / patch_size, X / patch_size].

    A Parzen histogram of 32 bins with centres from -1 to 1; 0 for a constant patch on a centre. Channel counts other than 3 are averaged.
    """
    weights = torch.tensor(GREY if x.shape[1] == 3 else [1 / x.shape[1]] * x.shape[1], device=x.device)
    grey = torch.einsum("bcyx,c->byx", x.float(), weights)
    B, Y, X = grey.shape
    patches = F.unfold(grey[:, None], patch_size, stride=patch_size).mT  # [B, P, pixels]
    centres = torch.linspace(-1, 1, NUM_BINS, device=x.device)
    kernel = torch.exp(-0.5 * ((patches[..., None] - centres) / SIGMA).square())  # [B, P, pixels, bins]
    density = kernel.mean(2)
    density = density / density.sum(-1, keepdim=True).clamp_min(1e-30)
    return -torch.special.xlogy(density, density).sum(-1).view(B, Y // patch_size, X // patch_size)


def entropy_threshold(images: Tensor, patch_size: int, fine_ratio: float) -> float:
    """The threshold above which a share `fine_ratio` of the patches of these images [B, C, Y, X] lies."""
    values = entropy(images, patch_size).flatten()
    return torch.quantile(values[: 2**24], 1 - fine_ratio).item()  # torch.quantile takes no more


def code_counts(grain: Tensor) -> Tensor:
    """Grain maps [B, y, x] -> [B] int64, how many codes each image needs."""
    return (4**grain).flatten(1).sum(1)


def grain_of(ids: Tensor, num_grains: int) -> Tensor:
    """The coarsest grain map with which ids [B, Y, X] can be written: a square whose ids are all equal is one code."""
    grain = torch.full_like(ids[:, :: 2 ** (num_grains - 1), :: 2 ** (num_grains - 1)], num_grains - 1)
    for level in range(
        num_grains - 1, 0, -1
    ):  # from fine to coarse: is every square of the next coarser grain constant?
        side, per_region = 2 ** (num_grains - level), 2 ** (level - 1)
        constant = (ids == expand(ids[:, ::side, ::side], side)).float()
        whole = F.avg_pool2d(constant[:, None], side * per_region).squeeze(1) == 1
        grain = torch.where(whole & (grain == level), level - 1, grain)
    return grain


def _keep(grain: Tensor, num_grains: int) -> tuple[Tensor, Tensor]:
    """(side of the square each fine cell is coded in, whether it is the first cell of that square), [B, Y, X] each."""
    side = expand(2 ** (num_grains - 1 - grain), 2 ** (num_grains - 1))
    rows = torch.arange(side.shape[1], device=grain.device)[:, None]
    columns = torch.arange(side.shape[2], device=grain.device)
    return side, (rows % side == 0) & (columns % side == 0)


def pack(ids: Tensor, grain: Tensor, num_grains: int = 2) -> Packed:
    """ids [B, 1, Y, X] on the fine grid, where coarser codes are repeated, and grain maps -> every code once.

    Positions are those of a code's first fine cell. Coarse codes come first, and codes of one grain in row order.
    Raises: GenkitError for ids that differ within a square the grain map calls one code.
    """
    flat = ids[:, 0]
    side, first = _keep(grain, num_grains)
    if not torch.equal(spread(flat, side), flat):
        raise GenkitError("ids differ within a cell that their grain map codes as one; the map belongs to other ids")
    image, position = first.flatten(1).nonzero(as_tuple=True)
    order = (image * (num_grains + 1) + (num_grains - side.flatten(1)[image, position].log2().long())).argsort(
        stable=True
    )
    image, position = image[order], position[order]
    counts = code_counts(grain).tolist()
    return list(zip(position.split(counts), flat.flatten(1)[image, position].split(counts), strict=True))


def unpack(packed: Packed, grid: tuple[int, int], num_grains: int = 2) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`: (ids [B, 1, Y, X], grain maps) for a fine grid (Y, X). The number of codes in a region says its grain.

    Raises: GenkitError for positions outside the grid, twice the same or not those of whole regions.
    """
    Y, X = grid
    times = 2 ** (num_grains - 1)
    position = torch.cat([positions for positions, _ in packed])
    codes = torch.cat([codes for _, codes in packed])
    counts = torch.tensor([len(positions) for positions, _ in packed], device=position.device)
    image = torch.repeat_interleave(torch.arange(len(packed), device=position.device), counts)
    if len(codes) != len(position) or (len(position) and not 0 <= int(position.min()) <= int(position.max()) < Y * X):
        raise GenkitError(f"packed positions must be one for each code, in 0..{Y * X - 1} of a {Y}x{X} grid")
    per_image = (Y // times) * (X // times)
    region = image * per_image + (position // X // times) * (X // times) + position % X // times
    found = torch.bincount(region, minlength=len(packed) * per_image)
    grain = (found.clamp_min(1).double().log2() / 2).round().long().clamp_max(num_grains - 1)
    grain = grain.view(len(packed), Y // times, X // times)
    side, first = _keep(grain, num_grains)
    stated = torch.zeros(len(packed), Y * X, dtype=torch.bool, device=position.device)
    stated[image, position] = True
    if not torch.equal(stated.view_as(first), first) or len(position) != int(first.sum()):
        raise GenkitError("packed positions do not cover every region of the grid exactly once")
    ids = torch.zeros(len(packed), Y * X, dtype=torch.int64, device=position.device)
    ids[image, position] = codes
    return spread(ids.view(-1, Y, X), side)[:, None], grain


def spread(values: Tensor, side: Tensor) -> Tensor:
    """Every cell takes the value of the first cell of its square: values [B, Y, X], side [B, Y, X] -> [B, Y, X]."""
    B, Y, X = values.shape
    rows = torch.arange(Y, device=side.device)[:, None]
    columns = torch.arange(X, device=side.device)
    source = (rows - rows % side) * X + columns - columns % side
    return values.flatten(1).gather(1, source.flatten(1)).view(B, Y, X)


def mask_weights(grain: Tensor, num_grains: int) -> Tensor:
    """[B, Y, X] float: a fine cell counts 1, a cell of a square of n equal ones 1 / n, so that every code counts the same."""
    return (1.0 / 4.0 ** (num_grains - 1 - expand(grain, 2 ** (num_grains - 1)))).float()
