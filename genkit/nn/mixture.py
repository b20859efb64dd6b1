"""Mixtures of Gaussians whose means lie near a plane of low rank (Kim et al., "CLaM-TTS", ICLR 2024; "ResGen", ICML 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from genkit.rng import pick


@dataclass(frozen=True)
class Mixture:
    """p(z) = sum_c pi_c N(z; shift + exp(log_scale) * (low_c basis), sigma^2), for every place [...] of vectors z [..., C].

    With K components of rank r no tensor of K C numbers is ever made.
    """

    logits: Tensor  # [..., K]
    low: Tensor  # [..., K, r]
    shift: Tensor  # [..., C]
    log_scale: Tensor  # [..., C]
    log_sigma: Tensor  # [...]
    basis: Tensor  # [r, C], the same everywhere
    codes: Any = None  # what turns vectors into ids, see genkit.objectives.resgen.Codes

    def chunk(self, count: int) -> list[Mixture]:
        """Parts of the batch."""
        names = ("logits", "low", "shift", "log_scale", "log_sigma")
        parts = [getattr(self, name).chunk(count) for name in names]
        return [replace(self, **dict(zip(names, part, strict=True))) for part in zip(*parts, strict=True)]

    @property
    def ndim(self) -> int:
        """Of the logits."""
        return self.logits.ndim

    def components(self, z: Tensor) -> Tensor:
        """log N(z; mu_c, sigma^2), [..., K]."""
        C = z.shape[-1]
        y, scale = z - self.shift, self.log_scale.exp()  # [..., C]
        stretched = self.basis * scale.unsqueeze(-2)  # [..., r, C]
        along = (self.low @ (stretched @ y.unsqueeze(-1))).squeeze(-1)  # [..., K]: <y, mu_c - shift>
        length = ((self.low @ (stretched @ stretched.transpose(-1, -2))) * self.low).sum(-1)  # |mu_c - shift|^2
        square = (y.square().sum(-1, keepdim=True) - 2 * along + length).clamp_min(0)
        log_sigma = self.log_sigma.unsqueeze(-1)
        return -0.5 * square * (-2 * log_sigma).exp() - C * (log_sigma + 0.5 * math.log(2 * math.pi))

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z), [...]."""
        return torch.logsumexp(self.logits.log_softmax(-1) + self.components(z), dim=-1)

    def bound(self, z: Tensor, free: bool = True) -> Tensor:
        """A lower bound of log p(z), [...]: sum_c q_c log N(z; mu_c) - KL(q | pi), with q held fixed.

        Args:
            free: q_c in proportion to N(z; mu_c), which keeps all components in use; False: to pi_c N(z; mu_c), where the bound is tight.
        """
        log_n, log_pi = self.components(z), self.logits.log_softmax(-1)
        log_q = (log_n if free else log_pi + log_n).detach().log_softmax(-1)
        return (log_q.exp() * (log_n + log_pi - log_q)).sum(-1)

    def draw(self, u: Tensor, noise: Tensor, top_p: float, temperature: float) -> tuple[Tensor, Tensor]:
        """(z [..., C], component [...]): a component by u [...] in [0, 1) out of the fewest that have top_p of the weight, then mu + temperature sigma noise."""
        logits = nucleus(self.logits, top_p)
        component = pick(logits, u)
        low = self.low.gather(-2, component[..., None, None].expand(*component.shape, 1, self.low.shape[-1])).squeeze(
            -2
        )
        mean = self.shift + self.log_scale.exp() * (low @ self.basis)
        return mean + temperature * self.log_sigma.exp().unsqueeze(-1) * noise, component


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """logits with -inf at all but the fewest likeliest whose probabilities sum to at least top_p (Holtzman et al., 2020)."""
    if top_p >= 1:
        return logits
    ordered, index = logits.sort(dim=-1, descending=True)
    weight = ordered.softmax(-1)
    behind = weight.cumsum(-1) - weight >= top_p  # what stands before it is enough
    return logits.masked_fill(torch.zeros_like(behind).scatter(-1, index, behind), -torch.inf)


def lerp_logits(null: Mixture, full: Mixture, weight: Tensor | float) -> Mixture:
    """The full mixture with logits null + weight (full - null)."""
    return replace(full, logits=torch.lerp(null.logits, full.logits, weight))
