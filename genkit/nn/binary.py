"""Binary quantisation: the sign of every channel is a bit of the id. No codebook; an entropy keeps all codes in use.

Lookup-free: Yu et al., "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation" (MAGVIT-v2), 2023, section 3.1. Spherical: Zhao et
al., "Image and Video Tokenization with Binary Spherical Quantization", 2024. Both entropies are exact and no tensor is as wide as the codebook:
bits are independent given the vector, so that the entropy of one vector is the sum of those of its bits, and the probabilities of all codes are
the outer product of those of two halves of the bits, whose mean over vectors is one matrix product.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.errors import UsageError
from genkit.nn import residual
from genkit.nn.codebook import normalise
from genkit.nn.entropy import entropy, over_processes
from genkit.nn.narrow import FromNarrow
from genkit.nn.quantize import Quantized
from genkit.nn.straight_through import straight_through
from genkit.nn.usage import Usage

BitOrder = Literal["big", "little"]

_HALF_BITS = 9  # the widest tensor has 2^9 columns; the mean over vectors is taken of up to 18 bits at once
_MOST_COUNTED = 2**20  # codes; larger histograms cost more than they tell


class BinaryQuantizer(nn.Module):
    """Projection, signs, projection back.

    Args:
        dim: D, width of the vectors that come and go.
        codebook_size: S = 2^d, d bits.
        num_groups: G codes per vector and step, each of d channels. Where G d differs from D, a linear layer goes in and one comes out.
        depth: residual steps, each with half the length of the one before.
        is_spherical: vectors and codes have length 1.
        scale: length of a code along each channel (of the whole code where it is spherical) in the first step.
        bit_order: "big": the first channel is the highest bit of the id, "little": the lowest.
        entropy: weight of the entropy loss; 0 = off.
        diversity: weight of the mean distribution's entropy within it.
        temperature: of the soft assignment that the entropies are taken of, p(code) ~ exp(2 z.code / temperature).
        group_bits: most bits whose joint distribution counts; further bits make another group. 18 is the most, and exact up to 2^18 codes.
        has_bias: of the two linear layers.

    Attributes:
        num_levels: Q = depth G, ids per place, step by step, group by group within.

    Raises: UsageError for a codebook_size that is no power of two.
    """

    shifts: Tensor  # [d] int64, the place of each channel's bit

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int,
        num_groups: int = 1,
        depth: int = 1,
        is_spherical: bool = False,
        scale: float = 1.0,
        bit_order: BitOrder = "big",
        entropy: float = 0.1,
        diversity: float = 1.0,
        temperature: float = 0.01,
        group_bits: int = 2 * _HALF_BITS,
        has_bias: bool = True,
    ):
        super().__init__()
        bits = codebook_size.bit_length() - 1
        if codebook_size < 2 or codebook_size != 1 << bits:
            raise UsageError(f"codebook_size={codebook_size} is not a power of two; {1 << max(1, bits)} is one")
        if not 1 <= group_bits <= 2 * _HALF_BITS:
            raise UsageError(f"group_bits={group_bits} must be in 1..{2 * _HALF_BITS}")
        if not temperature > 0:
            raise UsageError(f"temperature={temperature} must be above 0")
        self.codebook_size, self.num_levels = codebook_size, depth * num_groups
        self.num_groups, self.depth, self.bits, self.is_spherical = num_groups, depth, bits, is_spherical
        self.entropy, self.diversity, self.temperature, self.group_bits = entropy, diversity, temperature, group_bits
        length = scale / math.sqrt(bits) if is_spherical else scale
        self.lengths = [length * 2.0**-step for step in range(depth)]  # of a code along each channel
        order = range(bits) if bit_order == "little" else range(bits - 1, -1, -1)
        self.register_buffer("shifts", torch.tensor(list(order)), persistent=False)
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if bits * num_groups != dim:
            self.project_in = nn.Linear(dim, bits * num_groups, bias=has_bias)
            self.project_out = FromNarrow(bits * num_groups, dim, bias=has_bias)
        if codebook_size <= _MOST_COUNTED:
            self.use = Usage(num_levels=self.num_levels, codebook_size=codebook_size)

    def forward(self, z: Tensor) -> Quantized:
        """z [B, *grid, D] -> Quantized.

        The codes hand their gradient to the signs: multiplied by their length along a channel, 1 without is_spherical.

        Losses: "commitment", mean squared distance of the (projected, length-1) vectors to their codes; in training also "entropy", weighted,
        mean entropy of a vector's soft assignment minus `diversity` times the entropy of the mean assignment, in nats. The mean runs over the
        batch of all processes and is the same for every image; micro-batches do change it.
        """
        B, *grid, _ = z.shape
        z = self.project_in(z)
        with torch.autocast(z.device.type, enabled=False):
            rows = z.float().reshape(-1, self.num_groups, self.bits)  # [N, G, d]
            rows = normalise(rows) if self.is_spherical else rows
            total, ids, seen = residual.quantise(rows, self.lengths, self._nearest, self._codes)
            losses = {"commitment": (rows - total).square().reshape(B, -1).mean(1)}
            if self.training and self.entropy:
                losses["entropy"] = self.entropy * self._entropy(seen, B)
            codes = straight_through(rows * self.lengths[0], total)
            ids = ids.flatten(1)  # [N, Q]
            if self.training and self.codebook_size <= _MOST_COUNTED:
                self.use.count(ids.T)
        codes = self.project_out(codes.reshape(B, *grid, -1).to(z.dtype))
        return Quantized(codes, ids.reshape(B, *grid, -1), losses)

    def codes(self, ids: Tensor) -> Tensor:
        """ids [B, *grid, Q] in [0, S) -> codes [B, *grid, D]."""
        B, *grid, _ = ids.shape
        total = residual.look_up(ids.reshape(-1, self.depth, self.num_groups), self.lengths, self._codes)
        parameter = next(self.parameters(), total)  # the projections say which precision goes out
        return self.project_out(total.reshape(B, *grid, -1).to(parameter.dtype))

    def _nearest(self, rows: Tensor) -> Tensor:
        """rows [..., d] -> ids [...]; zero counts as negative."""
        return ((rows > 0).long() << self.shifts).sum(-1)

    def _codes(self, ids: Tensor) -> Tensor:
        """ids [...] -> signs [..., d], 1 or -1."""
        return (ids[..., None] >> self.shifts & 1).float() * 2 - 1

    def _entropy(self, seen: list[Tensor], batch: int) -> Tensor:
        """What each step saw, [N, G, d] each -> [B]."""
        found = []
        for rows, length in zip(seen, self.lengths, strict=True):
            rows = normalise(rows) if self.is_spherical else rows
            logits = 4 * length / self.temperature * rows  # of every bit being 1
            # H(sigmoid(a)) = softplus(a) - a sigmoid(a)
            of_bits = F.softplus(logits) - logits * logits.sigmoid()
            of_samples = of_bits.sum(-1).reshape(batch, -1).mean(1)  # [B]
            found.append(of_samples - self.diversity * self._entropy_of_mean(logits))
        return torch.stack(found).mean(0)

    def _entropy_of_mean(self, logits: Tensor) -> Tensor:
        """logits of the bits [N, G, d] -> [], entropy of the mean distribution over codes; groups of bits are added up."""
        total = logits.new_zeros(())
        for group in logits.transpose(0, 1).tensor_split(-(-self.bits // self.group_bits), dim=-1):  # [G, N, b]
            halves = [_probabilities(half) for half in group.tensor_split(2, dim=-1)]  # [G, N, 2^(b/2)]
            mean = halves[0].mT @ halves[1] / logits.shape[0]  # [G, 2^(b/2), 2^(b/2)]
            total = total + entropy(over_processes(mean).flatten(1)).mean()
        return total


def _probabilities(logits: Tensor) -> Tensor:
    """Logits of b independent bits [G, N, b] -> probabilities of their 2^b values [G, N, 2^b]."""
    places = torch.arange(logits.shape[-1], device=logits.device)
    values = torch.arange(2 ** len(places), device=logits.device)
    corners = (values[:, None] >> places & 1) - 0.5  # [2^b, b]
    return (logits @ corners.T).softmax(-1)
