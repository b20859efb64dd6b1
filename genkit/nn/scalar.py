"""Finite scalar quantisation: a few numbers per vector, each rounded to one of a few levels. No codebook, no loss.

Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple", 2023. Behaviour as in lucidrains/vector-quantize-pytorch
finite_scalar_quantization.py and residual_fsq.py, whose bound is wider by 1e-3 where the paper's text has it narrower, so that the outermost levels
can be reached. The symmetric variant: Parker et al., "Scaling Transformers for Low-Bitrate High-Quality Speech Coding", 2024, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genkit.errors import UsageError
from genkit.nn import residual
from genkit.nn.narrow import FromNarrow
from genkit.nn.quantize import Quantized
from genkit.nn.straight_through import straight_through
from genkit.nn.usage import Usage

_MARGIN = 1e-3  # by which half the range of the levels is wider
_MOST_COUNTED = 2**20  # codes; larger histograms cost more than they tell
_MOST_EXACT = 2**24  # whole numbers that float32 holds without a gap


def bound(z: Tensor, levels: Tensor, *, is_clamped: bool = False) -> Tensor:
    """z [..., d] -> numbers that rounding takes to one of `levels` [d] whole numbers, the one in the middle (the upper one of two) being 0.

    The paper's f, appendix A.1: tanh(z + shift) half - offset; with is_clamped limits in place of the tanh.
    """
    half = (levels.float() - 1) * (1 + _MARGIN) / 2
    offset = (levels % 2 == 0) * 0.5
    if is_clamped:
        return (z + offset / half).clamp(-1, 1) * half - offset
    return (z + (offset / half).atanh()).tanh() * half - offset


class _Rounded(torch.autograd.Function):
    """`bound`, rounding and the gradient that passes by it in one step: written out operation by operation they take longer than the matrix products."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, shift: Tensor, half: Tensor, offset: Tensor, middle: Tensor) -> Any:
        bent = (z + shift).tanh_()
        steps = (bent * half).sub_(offset).round_()  # from the middle level
        ctx.save_for_backward(bent, half, middle)
        digits = steps + middle
        ctx.mark_non_differentiable(digits)
        return steps.div_(middle), digits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        bent, half, middle = ctx.saved_tensors
        return torch.addcmul(grads[0], grads[0] * bent, bent, value=-1).mul_(half / middle), None, None, None, None


class ScalarQuantizer(nn.Module):
    """Projection, rounding, projection back.

    Args:
        dim: D, width of the vectors that come and go.
        levels: how many values each of the d = len(levels) numbers may take; the codebook has their product S. The paper's: [8, 6, 5] for about
            2^8 codes, [8, 5, 5, 5] for 2^10, [7, 5, 5, 5, 5] for 2^12, [8, 8, 8, 6, 5] for 2^14.
        num_groups: G codes per vector and step, each for d numbers of its own. Where G d differs from D, a linear layer goes in and one comes out.
        depth: residual steps, each with levels as much finer as there are levels.
        is_symmetric: levels lie evenly on [-1, 1]; a number of 2 levels needs it, and so do residual steps. Else 0 is always a level.
        is_clamped: numbers are limited to [-1, 1] by clamping instead of by tanh.
        soft_clamp: [d] limits that the projected vector approaches but does not pass, before anything else; None = none.
        has_bias: of the two linear layers.

    Attributes:
        num_levels: Q = depth G, ids per place, step by step, group by group within.

    Raises: UsageError for levels that cannot be.
    """

    levels: Tensor  # [d] int64
    basis: Tensor  # [d] int64, what a step of each number adds to the id
    limits: Tensor  # [4, d] float32: shift, half, offset and middle level of `bound`

    def __init__(
        self,
        *,
        dim: int,
        levels: Sequence[int],
        num_groups: int = 1,
        depth: int = 1,
        is_symmetric: bool = False,
        is_clamped: bool = False,
        soft_clamp: Sequence[float] | None = None,
        has_bias: bool = True,
    ):
        super().__init__()
        levels = list(levels)
        if not levels or min(levels) < 2:
            raise UsageError(f"levels={levels} must list numbers of at least 2, for example [8, 5, 5, 5]")
        if not is_symmetric and min(levels) == 2:
            raise UsageError(f"levels={levels}: a number with 2 levels needs the symmetric variant; set it, or use 3")
        if not is_symmetric and depth > 1:
            raise UsageError(f"{depth} residual steps need the symmetric variant")
        self.codebook_size, self.num_levels = math.prod(levels), depth * num_groups
        self.num_groups, self.depth, self.is_symmetric, self.is_clamped = num_groups, depth, is_symmetric, is_clamped
        self.code_dim = d = len(levels)
        self.soft_clamp = None if soft_clamp is None else list(soft_clamp)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer(
            "basis", torch.tensor([math.prod(levels[:i]) for i in range(d)]), persistent=False
        )  # the first number is the fastest digit
        counts = self.levels.float()
        half, offset = (counts - 1) * (1 + _MARGIN) / 2, (self.levels % 2 == 0) * 0.5
        shift = torch.zeros_like(half) if is_symmetric else (offset / half).atanh()
        limits = torch.stack([shift, half, offset, (self.levels // 2).float()])
        self.register_buffer("limits", limits, persistent=False)
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if d * num_groups != dim:
            self.project_in = nn.Linear(dim, d * num_groups, bias=has_bias)
            self.project_out = FromNarrow(d * num_groups, dim, bias=has_bias)
        if self.codebook_size <= _MOST_COUNTED:
            self.use = Usage(num_levels=self.num_levels, codebook_size=self.codebook_size)

    def forward(self, z: Tensor) -> Quantized:
        """z [B, *grid, D] -> Quantized, without losses."""
        B, *grid, _ = z.shape
        z = self.project_in(z)
        with torch.autocast(z.device.type, enabled=False):
            rows = z.float().reshape(-1, self.num_groups, self.code_dim)  # [N, G, d]
            if self.soft_clamp is not None:
                limit = torch.tensor(self.soft_clamp, device=z.device)
                rows = (rows / limit).tanh() * limit
            if self.depth == 1:
                if self.is_symmetric or self.is_clamped:
                    bounded, position = self._bound(rows)
                    digits = self._digits(position)
                    codes = straight_through(bounded, self._values(digits))
                else:
                    codes, digits = _Rounded.apply(rows, *self.limits)
                ids = self._number(digits)[:, None]  # [N, 1, G]
            else:
                total, ids, _ = residual.quantise(rows, self._scales(), self._nearest, self._codes)
                codes = straight_through(rows, total)
            ids = ids.flatten(1)  # [N, Q]
            if self.training and self.codebook_size <= _MOST_COUNTED:
                self.use.count(ids.T)
        codes = self.project_out(codes.reshape(B, *grid, -1).to(z.dtype))
        return Quantized(codes, ids.reshape(B, *grid, -1), {})

    def codes(self, ids: Tensor) -> Tensor:
        """ids [B, *grid, Q] in [0, S) -> codes [B, *grid, D]."""
        B, *grid, _ = ids.shape
        total = residual.look_up(ids.reshape(-1, self.depth, self.num_groups), self._scales(), self._codes)
        parameter = next(self.parameters(), total)  # the projections say which precision goes out
        return self.project_out(total.reshape(B, *grid, -1).to(parameter.dtype))

    def _bound(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z [..., d] -> (limited to about [-1, 1], where between the levels that is)."""
        if self.is_symmetric:
            bounded = z.clamp(-1, 1) if self.is_clamped else z.tanh()
            return bounded, (self.levels.float() - 1) * (bounded.detach() + 1) / 2
        position = bound(z, self.levels, is_clamped=self.is_clamped)
        return position / (self.levels // 2), position.detach()

    def _digits(self, position: Tensor) -> Tensor:
        """Places between the levels [..., d] -> the nearest level of each number, float, in [0, levels)."""
        return (position + 0.5).floor() if self.is_symmetric else position.round() + self.levels // 2

    def _values(self, digits: Tensor) -> Tensor:
        """Levels [..., d] -> the numbers they stand for, in [-1, 1]."""
        if self.is_symmetric:
            return digits * (2 / (self.levels.float() - 1)) - 1
        half = self.levels // 2
        return (digits - half) / half

    def _nearest(self, rows: Tensor) -> Tensor:
        """rows [..., d] -> ids [...]."""
        return self._number(self._digits(self._bound(rows)[1]))

    def _number(self, digits: Tensor) -> Tensor:
        """Levels [..., d], float -> ids [...] int64."""
        if self.codebook_size <= _MOST_EXACT:
            return (digits @ self.basis.float()).long()
        return (digits.long() * self.basis).sum(-1)

    def _codes(self, ids: Tensor) -> Tensor:
        """ids [...] -> codes [..., d]."""
        return self._values((ids[..., None] // self.basis % self.levels).float())

    def _scales(self) -> list[Tensor | float]:
        return [1.0, *(self.levels.float() ** -step for step in range(1, self.depth))]
