"""Vectors to their nearest codes: projections to a narrower space, heads, levels of residuals, and a gradient that passes by.

van den Oord et al. 2017, section 3.2 (straight-through, commitment); Yu et al., "Vector-quantized Image Modeling with Improved VQGAN", 2021,
section 3.2 (narrow and length-1 codes); Zeghidour et al., "SoundStream", 2021, section III.C (residuals, quantiser dropout). Head and projection
layout as in lucidrains/vector-quantize-pytorch, so that its weights fit. Difference from it: one gradient passes by the sum of all levels, as in
Lee et al., "Autoregressive Image Generation using Residual Quantization", 2022; there one passes by each level, which multiplies it by their number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genkit.nn.codebook import Codebook, Update, normalise
from genkit.nn.straight_through import WAYS, Gradient
from genkit.rng import Rng


@dataclass
class Quantized:
    """What a quantiser makes of vectors [B, *grid, D]."""

    codes: Tensor  # [B, *grid, D]; with a gradient for the vectors
    ids: Tensor  # [B, *grid, Q] int64; -1 where quantiser dropout left a level out
    losses: dict[str, Tensor]  # name -> [B]


class Quantizer(nn.Module):
    """Projection, codebook, projection back.

    A vector is split into H heads; each head is replaced by a code, what is left of it by another, and so on, L times in all. The ids of a
    place are in the order of precision: level by level, head by head within.

    Args:
        dim: D, width of the vectors that come and go.
        codebook_size: S.
        codebook_dim: d, width of a code, per head; None = D. Where H d differs from D, a linear layer goes in and one comes out.
        num_heads: H codes per vector and level, each for its own slice of the (projected) vector.
        is_shared: all heads use one table instead of one each.
        depth: L.
        is_shared_by_levels: all levels use the same table or tables.
        min_depth: quantiser dropout: in training every batch uses a number of levels drawn from min_depth .. L; None = always L.
        cosine: vectors and codes are compared with length 1, and codes have it.
        gradient: how the gradient of the codes becomes one of the vectors, see genkit.nn.straight_through.
        update, decay, restart: see Codebook.

    Attributes:
        num_levels: Q = L H, ids per place.
    """

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        num_heads: int = 1,
        is_shared: bool = False,
        depth: int = 1,
        is_shared_by_levels: bool = False,
        min_depth: int | None = None,
        cosine: bool = False,
        gradient: Gradient = "straight_through",
        update: Update = "ema",
        decay: float = 0.99,
        restart: float = 0.0,
    ):
        super().__init__()
        self.codebook_size, self.num_levels = codebook_size, depth * num_heads
        self.num_heads, self.is_shared, self.depth, self.min_depth = num_heads, is_shared, depth, min_depth
        self.pass_by = WAYS[gradient]
        code_dim = dim if codebook_dim is None else codebook_dim
        self.codebook = Codebook(
            num_codebooks=1 if is_shared else num_heads,
            num_levels=depth,
            is_shared=is_shared_by_levels,
            codebook_size=codebook_size,
            dim=code_dim,
            cosine=cosine,
            update=update,
            decay=decay,
            restart=restart,
        )
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if code_dim * num_heads != dim:
            self.project_in, self.project_out = (
                nn.Linear(dim, code_dim * num_heads),
                nn.Linear(code_dim * num_heads, dim),
            )

    def forward(self, z: Tensor) -> Quantized:
        """z [B, *grid, D] -> Quantized. In training mode the codebook remembers the batch until `codebook.after_step()`.

        Losses, each the mean over places, width and levels: "commitment", squared distance of the vectors to their codes; with
        update="gradient" also "codebook", the same with its gradient for the codes.
        """
        B, *grid, _ = z.shape
        z = self.project_in(z)
        with torch.autocast(z.device.type, enabled=False):
            rows = self._split(z.float())  # [G, N, d]
            used = self._draw_depth()
            target = residual = rows
            total, ids, commitment, pull = torch.zeros(()), [], [], []
            for level in range(used):
                target = normalise(residual) if self.codebook.cosine else residual
                found, found_ids = self.codebook(target, level)
                codes = found.detach().float()
                commitment.append(self._mean_square(target - codes, B))
                if found.requires_grad:
                    pull.append(self._mean_square(found.float() - target.detach(), B))
                residual = residual - codes
                total = codes if level == 0 else total + codes
                ids.append(self._merge(found_ids[..., None], B))  # [B, N / B, H]
            ids += [torch.full_like(ids[0], -1)] * (self.depth - used)
            # A length-1 code stands for the direction of its vector, a sum of several for the vector.
            passed = self.pass_by(target if self.depth == 1 else rows, total)
        codes = self.project_out(self._merge(passed, B).to(self.codebook.embed.dtype))
        losses = {"commitment": torch.stack(commitment).mean(0)}
        if pull:
            losses["codebook"] = torch.stack(pull).mean(0)
        return Quantized(codes.reshape(B, *grid, -1), torch.cat(ids, dim=-1).reshape(B, *grid, -1), losses)

    def codes(self, ids: Tensor) -> Tensor:
        """ids [B, *grid, Q] in [0, S), or -1 for "add nothing" -> codes [B, *grid, D]."""
        B, *grid, _ = ids.shape
        total = torch.zeros(())
        for level in range(self.depth):
            own = self._split(ids[..., level * self.num_heads : (level + 1) * self.num_heads]).squeeze(-1)  # [G, N]
            codes = self.codebook.codes(own.clamp_min(0), level)
            codes = codes.masked_fill((own < 0)[..., None], 0).float()
            total = codes if level == 0 else total + codes
        return self.project_out(self._merge(total, B).to(self.codebook.embed.dtype)).reshape(B, *grid, -1)

    def _draw_depth(self) -> int:
        """Levels to use: a number per optimiser step, so that it is the same on every process, in every micro-batch and after a resume."""
        if not self.training or self.min_depth is None:
            return self.depth
        step = int(self.codebook.num_updates)
        if step == 0 or not self.codebook.is_ready:
            return self.depth  # the first step visits all levels: their codes are made of it
        return self.min_depth + int(Rng([step]).fork("depth").integers(self.depth - self.min_depth + 1, 1))

    @staticmethod
    def _mean_square(error: Tensor, batch: int) -> Tensor:
        """[G, N, d] -> [B], the mean over everything else."""
        return error.square().unflatten(1, (batch, -1)).mean((0, 2, 3))

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
