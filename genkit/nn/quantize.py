"""Vectors to their nearest codes, with projections to a narrower space, heads and a gradient that passes straight through.

van den Oord et al. 2017, section 3.2 (straight-through, commitment); Yu et al., "Vector-quantized Image Modeling with Improved VQGAN", 2021,
section 3.2 (narrow and length-1 codes). Head and projection layout as in lucidrains/vector-quantize-pytorch, so that its weights fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from genkit.nn.codebook import Codebook, normalise


@dataclass
class Quantized:
    """What a quantiser makes of vectors [B, *grid, D]."""

    codes: Tensor  # [B, *grid, D]; its gradient is handed to the input unchanged
    ids: Tensor  # [B, *grid, H] int64
    losses: dict[str, Tensor]  # "commitment": [B], mean squared distance of the vectors to their codes


class _StraightThrough(torch.autograd.Function):
    """(z, codes) -> codes, bit for bit; the gradient goes to z as if nothing had happened."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, codes: Tensor) -> Tensor:
        return codes.view_as(codes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Quantizer(nn.Module):
    """Projection, codebook, projection back.

    Args:
        dim: D, width of the vectors that come and go.
        codebook_size: S.
        codebook_dim: d, width of a code, per head; None = D. Where H d differs from D, a linear layer goes in and one comes out.
        num_heads: H codes per vector, each for its own slice of the (projected) vector.
        is_shared: all heads use one table instead of one each.
        cosine: vectors and codes are compared, and returned, with length 1.
        decay, restart: see Codebook.
    """

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        num_heads: int = 1,
        is_shared: bool = False,
        cosine: bool = False,
        decay: float = 0.99,
        restart: float = 0.0,
    ):
        super().__init__()
        self.num_heads, self.is_shared = num_heads, is_shared
        code_dim = codebook_dim or dim
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if code_dim * num_heads != dim:
            self.project_in, self.project_out = (
                nn.Linear(dim, code_dim * num_heads),
                nn.Linear(code_dim * num_heads, dim),
            )
        num_codebooks = 1 if is_shared else num_heads
        self.codebook = Codebook(
            num_codebooks=num_codebooks,
            codebook_size=codebook_size,
            dim=code_dim,
            cosine=cosine,
            decay=decay,
            restart=restart,
        )

    def forward(self, z: Tensor) -> Quantized:
        """z [B, *grid, D] -> Quantized. In training mode the codebook remembers the batch until `codebook.after_step()`."""
        B, *grid, _ = z.shape
        z = self.project_in(z)
        with torch.autocast(z.device.type, enabled=False):
            rows = self._split(z.float())  # [G, N, d]
            rows = normalise(rows) if self.codebook.cosine else rows
            found, ids = self.codebook(rows)
            commitment = self._merge((rows - found).square(), B).flatten(1).mean(1)  # [B]
            codes = self._merge(_StraightThrough.apply(rows, found.float()), B)  # [B, N, H d]
        codes = self.project_out(codes.to(found.dtype))
        ids = self._merge(ids[..., None], B)  # [B, N, H]
        return Quantized(codes.reshape(B, *grid, -1), ids.reshape(B, *grid, -1), {"commitment": commitment})

    def codes(self, ids: Tensor) -> Tensor:
        """ids [B, *grid, H] in [0, S) -> codes [B, *grid, D]."""
        B, *grid, _ = ids.shape
        codes = self._merge(self.codebook.codes(self._split(ids).squeeze(-1)), B)
        return self.project_out(codes).reshape(B, *grid, -1)

    def _split(self, x: Tensor) -> Tensor:
        """[B, *grid, H k] -> [G, N, k]: a group of rows per table."""
        heads = x.reshape(-1, self.num_heads, x.shape[-1] // self.num_heads)  # [N, H, k]
        return heads.flatten(0, 1)[None] if self.is_shared else heads.transpose(0, 1)

    def _merge(self, rows: Tensor, batch: int) -> Tensor:
        """The inverse of `_split`: [G, N, k] -> [B, N / B, H k]."""
        heads = (
            rows.reshape(-1, self.num_heads, rows.shape[-1]) if self.is_shared else rows.transpose(0, 1)
        )  # [N, H, k]
        return heads.reshape(batch, -1, self.num_heads * rows.shape[-1])
