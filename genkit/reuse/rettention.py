"""Re-ttention: sparse attention with softmax statistics from the last full step (Chen et al., NeurIPS 2025, arXiv 2505.22918).

Of all keys j a query i sees only those in a fixed mask M. Softmax over M alone makes the kept probabilities too large, by the ratio of the denominators
rho_i = sum_M exp(s_ij) / sum_all exp(s_ij) = exp(lse_M - lse_all), and drops what the other keys would add. A full step measures both, once per layer:

    rho = exp(lse_M - lse_all),    R = O_all - rho O_M

and the steps until the next full one compute O = rho O_M + R with their own queries, keys and values over M. At a full step this is O_all itself.

Differences from the release: R is kept before the output projection instead of behind it, which is linear; the released processors compute all scores and
mask them, here masked blocks are never touched; the ratio is clamped at 1; windows of tiles beside the release's band.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.interfaces import ATTEND, Cache
from genkit.kernels.block_sparse_attention.op import block_sparse_attention
from genkit.kernels.block_sparse_attention.pattern import Pattern, build, stack_samples
from genkit.kernels.block_sparse_attention.rules import band, tile_order, window
from genkit.nn.attend import block_size, everything
from genkit.reuse.calls import Carried, What, check_schedule, heeding

Carry = Literal["both", "residual", "none"]


class Rettention:
    """Serves every backbone with full attention between tokens: dit and masked with mixer.type=attention, fit, dimsum. Other mixers in it stay as they are.

    Args:
        density: share of all tokens that a token sees in a sparse step, in (0, 1].
        pattern: "band" the tokens next to it in raster order, as released; "window" the tiles around its own along every axis, never cut at borders.
        full_steps: so many calls of the model at the beginning are plain. 5 of 20 in the release for PixArt, 10 of 50 for HunyuanDiT, 15 of 50 for CogVideoX.
        period: one call in so many is full from then on, the first of them at once; 5 as released.
        refreshes: so many calls are full and measured at most, those after them live on the last; None = to the end. The release for PixArt stops after 3.
        ramp: what every sparse step adds to the ratio; 0.04 as released.
        clamp: the ratio stays at most 1, as by definition; the release lets it grow.
        carry: "both" ratio and residual; "residual" alone, R = O_all - O_M (DiTFastAttn, Yuan et al., 2024); "none" is plain sparse attention.
        tile: tokens per side of a tile of "window".
    """

    target = "z"

    def __init__(
        self,
        *,
        density: float = 0.03125,
        pattern: Literal["band", "window"] = "band",
        full_steps: int = 5,
        period: int = 5,
        refreshes: int | None = None,
        ramp: float = 0.04,
        clamp: bool = True,
        carry: Carry = "both",
        tile: int = 4,
    ):
        if not 0 < density <= 1:
            raise UsageError(f"sampler.reuse.density={density} must be in (0, 1]")
        if ramp < 0 or tile < 1:
            raise UsageError(f"sampler.reuse.ramp={ramp} must not be negative, sampler.reuse.tile={tile} at least 1")
        self.schedule = check_schedule("rettention", full_steps, period, refreshes)
        self.density, self.pattern, self.tile = density, pattern, tile
        self.ramp, self.clamp, self.carry = ramp, clamp, carry

    def start(self, model: Any) -> Carried:
        """Raises UsageError for a network without attention."""
        if not heeding(model, ATTEND):
            raise UsageError(
                f"sampler.reuse.type=rettention serves full attention between tokens, and this {type(model).__name__} has none; "
                "use reuse.type=skip_blocks, or a backbone with mixer.type=attention"
            )
        return Carried(model, self.schedule, lambda: Statistics(self))

    def pattern_for(
        self, q: Tensor, grid: tuple[int, ...] | None = None, valid: Tensor | None = None
    ) -> tuple[Pattern, tuple[Tensor, Tensor] | None]:
        """Who sees whom among the tokens of q [B, H, N, K], and the order they are taken in with the way back, [N] each, where it is not their own.

        Raises: UsageError for windows where tokens fill no grid.
        """
        if self.pattern == "band":
            N = q.shape[2]
            counts = (N,) if valid is None else tuple(valid.sum(1).tolist())
            return _band(N, counts, self.density, q.device), None
        if grid is None:
            raise UsageError(
                "sampler.reuse.pattern=window needs tokens in a full grid; samples of mixed sizes are packed without one: use pattern=band"
            )
        pattern, order, back = _window(grid, self.density, self.tile, q.device)
        return pattern, (order, back)


class Statistics:
    """Ratio and residual of every attention of a network, in the order in which a pass meets them."""

    def __init__(self, options: Rettention):
        self.options = options
        self.layers: list[tuple[Tensor, Tensor]] = []  # ratio [B, H, N, 1] float32, residual [B, H, N, K]

    def cache(self, what: What, t: Tensor | None) -> Cache | None:
        if what == "plain":
            return None
        if what == "full":
            self.layers.clear()
        return {ATTEND: Pass(self, what == "full")}


class Pass:
    """One call of the network: what its attentions ask, one after the other."""

    def __init__(self, statistics: Statistics, is_full: bool):
        self.statistics, self.is_full, self.count = statistics, is_full, 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, ...] | None, valid: Tensor | None) -> Tensor:
        """[B, H, N, K]."""
        options = self.statistics.options
        pattern, orders = options.pattern_for(q, grid, valid)
        if orders is not None:
            q, k, v = (x.index_select(2, orders[0]) for x in (q, k, v))
            valid = None if valid is None else valid.index_select(1, orders[0])
        if self.is_full:
            o, ratio, residual = measure(q, k, v, pattern, valid, options.carry)
            self.statistics.layers.append((ratio, residual))
        else:
            ratio, residual = self.statistics.layers[self.count]
            self.count += 1
            o = block_sparse_attention(q, k, v, pattern, valid=valid)[0]
            if options.carry == "both":
                o = torch.addcmul(residual, ratio.to(o.dtype), o)
                ratio.add_(options.ramp)
                if options.clamp:
                    ratio.clamp_(max=1)
            elif options.carry == "residual":
                o = residual + o
        return o if orders is None else o.index_select(2, orders[1])


def measure(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, valid: Tensor | None, carry: Carry = "both"
) -> tuple[Tensor, Tensor, Tensor]:
    """(full attention [B, H, N, K], ratio [B, H, N, 1] float32, residual [B, H, N, K]). A row without a key in the pattern has ratio 0."""
    o, lse = block_sparse_attention(q, k, v, everything(q.shape[2], q.device), valid=valid)
    if carry == "none":
        return o, lse.new_empty(0), o.new_empty(0)
    sparse, sparse_lse = block_sparse_attention(q, k, v, pattern, valid=valid)
    if carry == "residual":
        return o, lse.new_empty(0), o - sparse
    # Where all keys are padding both are -inf.
    ratio = (sparse_lse - lse).exp().nan_to_num(0.0).unsqueeze(-1)
    return o, ratio, torch.addcmul(o, ratio.to(o.dtype), sparse, value=-1)


@lru_cache(maxsize=16)
def _band(num_tokens: int, counts: tuple[int, ...], density: float, device: torch.device) -> Pattern:
    """|i - j| <= half of int(n density), as released: half as many keys at both ends of the sequence. n: real tokens of each sample, or one number for all."""
    with torch.inference_mode(False):
        size = block_size(num_tokens)
        patterns = [build(band(num_tokens, int(n * density) // 2), size) for n in counts]
        return (patterns[0] if len(set(counts)) == 1 else stack_samples(patterns)).to(device)


@lru_cache(maxsize=16)
def _window(grid: tuple[int, ...], density: float, tile: int, device: torch.device) -> tuple[Pattern, Tensor, Tensor]:
    """The pattern for tokens tile by tile, that order, and the way back. Of all windows of an odd number of tiles per axis, the one nearest to density."""
    with torch.inference_mode(False):
        tiles = [tile] * len(grid)
        counts = [math.ceil(n / tile) for n in grid]
        sizes = [_odd(count * density ** (1 / len(grid)), count) for count in counts]
        order = tile_order(grid, tiles)
        size = max(16, min(64, tile ** len(grid) // 16 * 16))
        pattern = build(window(grid, sizes, tiles).permuted(order), size)
        return pattern.to(device), order.to(device), order.argsort().to(device)


def _odd(wanted: float, count: int) -> int:
    """The odd number of tiles nearest to what is wanted; as many as an axis has, or one more, is all of them."""
    return min(2 * int(wanted / 2 + 1e-9) + 1, count + 1 - count % 2)
