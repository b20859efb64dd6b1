"""Rotary position embedding over one, two or three axes (Su et al., "RoFormer", 2021; LlamaGen, 2024).

The head width is split evenly between the axes; within an axis, channel pairs turn by coordinate * base^(-j / J).
Differences from LlamaGen: the first and second half of the head form the pairs (contiguous reads), and channels left
over by the split do not turn. As LlamaGen's class token, a token without a place (coordinates NaN) has queries and keys of 0: it attends to all alike.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from genkit.errors import UsageError

# coords tensor -> {(head_dim, base): table}. Layers and steps share a layout: each table is computed once in its life.
_tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def rope_table(coords: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles, each [B or 1, N, 1, head_dim / 2] float32, for coords [B or 1, N, A].

    Coordinates must not be changed in place after the first call.
    Raises UsageError when head_dim has no pair for every axis.
    """
    num_axes = coords.shape[-1]
    if head_dim % 2 or head_dim // 2 < num_axes:
        raise UsageError(
            f"rotary positions need an even head width >= {2 * num_axes} for {num_axes} axes, found {head_dim}"
        )
    if torch.compiler.is_compiling():  # the compiler folds the equal expressions of the layers itself
        return _table(coords, head_dim, base)
    # Outside inference mode: a table first made while sampling may later be kept for a backward pass.
    with torch.inference_mode(False), torch.no_grad():
        tables = _tables.setdefault(coords, {})
        if (head_dim, base) not in tables:
            tables[head_dim, base] = _table(coords, head_dim, base)
        return tables[head_dim, base]


def _table(coords: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    num_pairs = head_dim // 2
    per_axis = num_pairs // coords.shape[-1]
    exponents = torch.arange(per_axis, dtype=torch.float32, device=coords.device) / per_axis
    angles = (coords.float().unsqueeze(-1) * base**-exponents).flatten(-2)  # [B, N, A * per_axis]
    angles = torch.nn.functional.pad(angles, (0, num_pairs - angles.shape[-1])).unsqueeze(-2)  # [B, N, 1, K / 2]
    placed = coords.isfinite().all(-1)[..., None, None]
    return torch.where(placed, angles.cos(), 0.0), torch.where(placed, angles.sin(), 0.0)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """x [B, N, H, K] with every channel pair (j, j + K / 2) turned by its angle, in float32 or wider."""
    cos, sin = table
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def turn_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """x [..., K] with every channel pair (2j, 2j + 1) turned by its angle, in float32 or wider; angles [..., K / 2] broadcast to x and may be learned."""
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    angles = angles.to(pairs.dtype)
    cos, sin = angles.cos(), angles.sin()
    if torch.compiler.is_compiling():  # the compiler fuses real numbers, and knows no complex ones
        a, b = pairs.unbind(-1)
        return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)
    # One pass over memory in place of six.
    product = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin)
    return torch.view_as_real(product).flatten(-2).to(x.dtype)
