"""Vectors of a square grid to ids on grids that grow from one cell to the whole: residual quantisation over scales.

Tian et al., "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction" (VAR), NeurIPS 2024, algorithms 1 and 2; behaviour
as in FoundationVision/VAR models/quant.py. Huang et al., "NFIG: Autoregressive Image Generation with Next-Frequency Prediction", 2025, is the
same residual quantiser whose input arrives band by band (genkit.nn.frequency). Differences from both: the codebook follows its assignments instead
of a gradient, is clustered from the first batch and recycles codes (genkit.nn.codebook); the convolutions after the look-up start as the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.errors import UsageError
from genkit.kernels.nearest_code.chunked import nearest_code
from genkit.nn.codebook import Codebook, normalise
from genkit.nn.frequency import FrequencyBands
from genkit.nn.straight_through import WAYS, Gradient
from genkit.nn.usage import usage

_ALL_SCALES = -1  # the key of rows that were joined, which no scale has


@dataclass
class Scales:
    """What a ScaleQuantizer makes of features [B, C, Y, X]."""

    codes: Tensor  # [B, C, Y, X], the sum over all scales; its gradient is handed to the features unchanged
    ids: Tensor  # [B, N] int64: scale after scale, each in row order
    losses: dict[str, Tensor]  # name -> [B]


class ScaleCodebook(Codebook):
    """One table for all scales; its level k counts the codes that scale k uses.

    Args:
        by_direction: the nearest code is the one of the closest direction; it keeps its length ("znorm" of VAR).
    """

    def __init__(
        self, *, num_scales: int, by_direction: bool, codebook_size: int, dim: int, decay: float, restart: float
    ):
        super().__init__(
            num_levels=num_scales, is_shared=True, codebook_size=codebook_size, dim=dim, decay=decay, restart=restart
        )
        self.by_direction = by_direction

    def search(self, rows: Tensor, table: Tensor) -> Tensor:
        if self.by_direction:
            return nearest_code(normalise(rows), normalise(table), cosine=True)
        return nearest_code(rows, table)

    def prepare(self, rows: Tensor) -> None:
        """Before the first training batch: cluster these rows [1, N, d], which are of all scales, instead of those of the first one."""
        self._cluster(rows)

    def join_scales(self, batch: int) -> None:
        """After a batch went through all scales: its rows for restarts, image after image, as if they came from one scale.

        So neither their different numbers nor micro-batches matter to the order in which rows are drawn.
        """
        parts = [self._rows.pop(level)[0].unflatten(1, (batch, -1)) for level in sorted(self._rows) if level >= 0]
        if parts:
            self._rows.setdefault(_ALL_SCALES, []).append(torch.cat(parts, dim=2).flatten(1, 2))

    def stats(self) -> dict[str, float]:
        """Use of the table by all scales together, and "usage_k" by scale k."""
        least = (1 - self.decay) * self.decay ** (self.decay / (1 - self.decay)) if self.decay else 0.5
        return super().stats() | usage(self.recent.sum(0), least)


class ScaleQuantizer(nn.Module):
    """One codebook for all scales; each scale codes what the scales before it left over.

    Scale k shrinks what is left to p_k x p_k (mean over areas), looks the nearest codes up, enlarges them to the whole grid (bicubic), passes them
    through phi_k(h) = (1 - phi_ratio) h + phi_ratio conv(h) and takes the result off what is left. The last scale is the grid itself.

    Args:
        dim: C.
        codebook_size: S.
        patch_sizes: p_k, the side of each scale's grid, rising or the same again. The last one is Y = X of the features.
        num_phi: convolutions shared by all scales; each scale takes the one nearest to its place between the first and the last scale.
        phi_ratio: share of the convolution; 0 = no convolutions.
        cosine: nearest means of closest direction; codes keep their length.
        by_frequency: what is to be coded arrives in frequency bands, low ones first, one with each scale (NFIG).
        gradient: how the gradient of the codes becomes one of the features, see genkit.nn.straight_through.
        decay, restart: see Codebook.
    """

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int,
        patch_sizes: Sequence[int],
        num_phi: int = 4,
        phi_ratio: float = 0.5,
        cosine: bool = False,
        by_frequency: bool = False,
        gradient: Gradient = "straight_through",
        decay: float = 0.99,
        restart: float = 0.1,
    ):
        super().__init__()
        self.pass_by = WAYS[gradient]
        self.patch_sizes = tuple(patch_sizes)
        if dim < 1 or codebook_size < 1 or not 0 <= decay < 1 or not 0 <= restart < 1:
            raise UsageError(
                f"channels={dim} and codebook_size={codebook_size} must be at least 1, decay={decay} and restart={restart} in [0, 1)"
            )
        least = 1 if by_frequency else 0  # a band needs a width; without bands a scale may come twice
        if (
            not self.patch_sizes
            or self.patch_sizes[0] < 1
            or any(high - low < least for low, high in pairwise(self.patch_sizes))
        ):
            raise UsageError(
                f"patch_sizes={list(self.patch_sizes)} must rise{'' if by_frequency else ', or stay'}, from at least 1 to the side of the grid"
            )
        if not 0 <= phi_ratio <= 1 or num_phi < 1:
            raise UsageError(f"phi_ratio={phi_ratio} must be in [0, 1] and num_phi={num_phi} at least 1")
        self.dim, self.phi_ratio = dim, phi_ratio
        self.codebook = ScaleCodebook(
            num_scales=len(self.patch_sizes),
            by_direction=cosine,
            codebook_size=codebook_size,
            dim=dim,
            decay=decay,
            restart=restart,
        )
        self.phi = nn.ModuleList(_identity_conv(dim) for _ in range(num_phi if phi_ratio else 0))
        self.phi_of_scale = nearest_ticks(len(self.patch_sizes), num_phi)
        self.bands = FrequencyBands(self.patch_sizes) if by_frequency else None

    @property
    def num_tokens(self) -> int:
        """N, the sum of the areas of all scales."""
        return sum(p * p for p in self.patch_sizes)

    def forward(self, features: Tensor) -> Scales:
        """features [B, C, p_last, p_last] -> Scales, with the losses (VAR, eq. 5; NFIG, section 3.2)

        "commitment": squared distance of the features to the sums of codes, "phi": the same with a gradient to the convolutions instead. Means
        over the scales; by frequency only the last sum counts, because those before it lack bands on purpose.
        """
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            arriving = self._arriving(features.detach())
            if self.training and not self.codebook.is_ready:
                self.codebook.prepare(self._unquantised(arriving))
            left, total = torch.zeros_like(features), torch.zeros_like(features)
            found, commitment, phi = [], [], []
            for k, part in enumerate(arriving):
                left = left + part if part is not None else left
                ids = self._nearest(self._shrink(left, k), k)
                lifted = self._lift(ids, k)
                total = total + lifted
                left = left - lifted.detach()
                found.append(ids)
                commitment.append((features - total.detach()).square().flatten(1).mean(1))
                phi.append((features.detach() - total).square().flatten(1).mean(1))
            self.codebook.join_scales(len(features))
            counted = slice(-1, None) if self.bands is not None else slice(None)
            losses = {"commitment": torch.stack(commitment[counted]).mean(0)}
            if self.phi:
                losses["phi"] = torch.stack(phi[counted]).mean(0)
            # A vector is what a place has along the channels.
            passed = self.pass_by(features.movedim(1, -1), total.detach().movedim(1, -1))
            codes = passed.movedim(-1, 1)
        return Scales(codes, torch.cat([ids.flatten(1) for ids in found], dim=1), losses)

    def codes(self, ids: Tensor) -> Tensor:
        """ids [B, N] -> codes [B, C, Y, X], the sum over all scales."""
        return self.sums(ids)[-1]

    def sums(self, ids: Tensor) -> list[Tensor]:
        """ids [B, n] of the first scales, any number of them -> the sum of codes after each scale, [B, C, Y, X] each."""
        total: Tensor | int = 0
        sums = []
        for k, of_scale in enumerate(self.split(ids)):
            total = total + self._lift(of_scale, k)
            sums.append(total)
        return sums

    def next_inputs(self, ids: Tensor) -> Tensor:
        """ids [B, N] -> [B, N - p_1^2, C]: for every scale but the first, the sum of the scales before it, shrunk to that scale.

        With ids [B, n] of the first scales alone: the same up to the scale that follows them.
        """
        sums = self.sums(ids)[: len(self.patch_sizes) - 1]
        return torch.cat([self._shrink(total, k).flatten(2).mT for k, total in enumerate(sums, start=1)], dim=1)

    def add_scale(self, total: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """One step of sampling.

        Args:
            total: [B, C, Y, X], the sum of the scales before scale k (zeros before the first, k = 0).
            ids: [B, p_k^2] of scale k.

        Returns: the sum with scale k, and what the next scale sees: that sum shrunk to it (after the last scale the sum itself).
        """
        total = total + self._lift(ids.view(len(ids), self.patch_sizes[k], -1), k)
        return total, self._shrink(total, min(k + 1, len(self.patch_sizes) - 1))

    def split(self, ids: Tensor) -> list[Tensor]:
        """ids [B, n] of whole scales, from the first on -> [B, p_k, p_k] each."""
        areas = [p * p for p in self.patch_sizes]
        ends = np.cumsum(areas).tolist()
        if ids.shape[1] not in ends:
            raise UsageError(f"{ids.shape[1]} ids per image are no whole number of scales; scales end after {ends}")
        parts = ids.split(areas[: ends.index(ids.shape[1]) + 1], dim=1)
        return [part.unflatten(1, (p, p)) for part, p in zip(parts, self.patch_sizes, strict=False)]

    def _arriving(self, features: Tensor) -> list[Tensor | None]:
        """What is to be coded from each scale on, [B, C, Y, X] or nothing new; the sum is the features."""
        if self.bands is not None:
            return list(self.bands(features))
        return [features, *[None] * (len(self.patch_sizes) - 1)]

    def _shrink(self, x: Tensor, k: int) -> Tensor:
        """[B, C, Y, X] -> [B, C, p_k, p_k]; windows of uneven ratios overlap (adaptive mean)."""
        return x if k == len(self.patch_sizes) - 1 else F.interpolate(x, size=(self.patch_sizes[k],) * 2, mode="area")

    def _enlarge(self, x: Tensor, k: int) -> Tensor:
        """[B, C, p_k, p_k] -> [B, C, Y, X]."""
        side = self.patch_sizes[-1]
        return x if k == len(self.patch_sizes) - 1 else F.interpolate(x, size=(side, side), mode="bicubic")

    def _nearest(self, x: Tensor, k: int) -> Tensor:
        """[B, C, p_k, p_k] -> ids [B, p_k, p_k]."""
        rows = x.permute(0, 2, 3, 1)  # [B, p, p, C]
        return self.codebook(rows.reshape(1, -1, self.dim), k)[1].view(rows.shape[:3])

    def _lift(self, ids: Tensor, k: int) -> Tensor:
        """ids [B, p_k, p_k] -> what scale k adds, [B, C, Y, X]. The only way from ids to codes, so that both directions agree to the bit."""
        codes = self.codebook.codes(ids.reshape(1, -1)).view(*ids.shape, self.dim).permute(0, 3, 1, 2)
        codes = self._enlarge(codes.float(), k)
        if not self.phi:
            return codes
        return (1 - self.phi_ratio) * codes + self.phi_ratio * self.phi[self.phi_of_scale[k]](codes)

    def _unquantised(self, arriving: list[Tensor | None]) -> Tensor:
        """What the scales would be given if codes were exact, [1, B N, C]: what to cluster, as the first scale alone is one vector per image."""
        rows: list[Tensor] = []
        left = torch.zeros(())
        for k, part in enumerate(arriving):
            left = left + part if part is not None else left
            shrunk = self._shrink(left, k)
            rows.append(shrunk.permute(0, 2, 3, 1).reshape(1, -1, self.dim))
            left = left - self._enlarge(shrunk, k)
        return torch.cat(rows, dim=1)


def _identity_conv(dim: int) -> nn.Conv2d:
    conv = nn.Conv2d(dim, dim, 3, padding=1)
    nn.init.dirac_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def nearest_ticks(num_scales: int, num_ticks: int) -> list[int]:
    """For every scale the tick nearest to its place in [0, 1]. Ticks lie evenly, with half a step to the ends; four of them a third of a step
    from the ends, as in VAR, whose ten scales take 0, 0, 1, 1, 1, 2, 2, 3, 3, 3."""
    margin = 1 / (3 if num_ticks == 4 else 2) / num_ticks
    ticks = np.linspace(margin, 1 - margin, num_ticks)
    return [int(np.abs(ticks - k / max(1, num_scales - 1)).argmin()) for k in range(num_scales)]
