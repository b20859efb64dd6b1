"""Binary codes on a sphere: every channel's sign is a bit (Zhao et al., "Binary Spherical Quantization", 2024), as OctGPT trains them.

Beside genkit.nn.binary this keeps the bits apart instead of packing them into one id - 32 of them would make a codebook of 2^32 - and takes the entropies
bit by bit: of the mean assignment that is the joint one's upper bound, and costs nothing (`octree-nn/octgpt models/vae.py BinarySphericalQuantizer`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize


class BinarySphere(nn.Module):
    """Vectors [M, D] -> codes of length 1 and their D bits.

    Args:
        bits: D.
        certain: weight of the entropy of one vector's assignment, which is made small.
        diverse: weight of the entropy of the mean assignment, which is made large.
        temperature: of the assignment p(bit) = sigmoid(4 u / (sqrt(D) temperature)).
        flip: in training up to this share of the signs is turned around, drawn anew for every batch.
    """

    def __init__(
        self, bits: int, *, certain: float = 1.0, diverse: float = 1.0, temperature: float = 1.0, flip: float = 0.0
    ):
        super().__init__()
        self.bits, self.certain, self.diverse, self.temperature, self.flip = bits, certain, diverse, temperature, flip

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(codes [M, D] with the gradient of z / |z| / sqrt(D), bits [M, D] int64, entropy penalty []). A channel of 0 counts as negative."""
        u = normalize(z, dim=-1)
        sign = (u > 0).to(u.dtype) * 2 - 1
        if self.training and self.flip > 0:
            share = torch.rand((), device=u.device) * self.flip
            sign = torch.where(torch.rand_like(u) < share, -sign, sign)
        codes = (u + (sign - u).detach()) * self.bits**-0.5
        return codes, (sign > 0).long(), self.entropy(u)

    def entropy(self, u: Tensor) -> Tensor:
        """[]: certainty of each vector minus variety of all, in nats, divided by the temperature."""
        p = torch.sigmoid(4 * u / (self.bits**0.5 * self.temperature))
        own = _entropy(p).sum(-1).mean()
        joint = _entropy(p.mean(0)).sum()
        return (self.certain * own - self.diverse * joint) / self.temperature

    def codes(self, bits: Tensor) -> Tensor:
        """[..., D] of 0 and 1 -> codes of length 1."""
        return (bits.to(torch.get_default_dtype()) * 2 - 1) * self.bits**-0.5


def _entropy(p: Tensor) -> Tensor:
    """Of a bit; the small number is theirs, against the logarithm of 0."""
    return -(p * (p + 1e-8).log() + (1 - p) * (1 - p + 1e-8).log())
