"""Noising paths: how much of the data and how much noise is in x_t = alpha(t) x0 + sigma(t) noise, for t from 0 (data) to 1 (noise).

Objectives train along a path and predictors carry it as `predict.path`, so that a sampler needs to know nothing else. `t` and what is computed from it are
float64: near the ends differences of close numbers matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from genkit.interfaces import Path


@dataclass
class Predictor:
    """A function that keeps to genkit.interfaces.Predict, with the path it belongs to."""

    path: Path
    function: Callable[[Tensor, Tensor], tuple[Tensor, ...]]

    def __call__(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return self.function(x_t, t)


class Straight:
    """alpha = 1 - t, sigma = t (Liu et al., "Rectified Flow", 2022; Lipman et al., "Flow Matching", 2023).

    Args:
        shift: times for sampling move towards noise, t -> shift t / (1 + (shift - 1) t); 1 = even steps (Esser et al., 2024, eq. 23).
    """

    least = 0.0

    def __init__(self, shift: float = 1.0):
        self.shift = shift

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t.clone()

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(d alpha / dt, d sigma / dt)."""
        return -torch.ones_like(t), torch.ones_like(t)

    def times(self, num_steps: int) -> Tensor:
        t = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        return self.shift * t / (1 + (self.shift - 1) * t)


class Trigonometric(Straight):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): constant variance (SiT's "GVP", Ma et al., 2024)."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(t * (math.pi / 2))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(t * (math.pi / 2))

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        half = math.pi / 2
        return -half * torch.sin(t * half), half * torch.cos(t * half)


class Discrete:
    """The variance-preserving chain of DDPM (Ho et al., 2020): alpha^2 = abar_k, sigma^2 = 1 - abar_k at t = (k + 1) / T, and no noise at t = 0.

    Between its T steps log abar is interpolated linearly.

    Args:
        schedule: of the betas. "linear" 1e-4 .. 0.02 (DDPM, DiT), "scaled_linear" the square of a line from 0.00085^.5 to 0.012^.5 (Stable Diffusion),
            "cosine" (Nichol and Dhariwal, 2021, eq. 17).
        num_times: T.
    """

    def __init__(self, schedule: Literal["linear", "scaled_linear", "cosine"] = "linear", num_times: int = 1000):
        self.num_times, self.least = num_times, 1 / num_times
        double = torch.float64
        if schedule == "linear":
            betas = torch.linspace(1e-4, 0.02, num_times, dtype=double)
        elif schedule == "scaled_linear":
            betas = torch.linspace(0.00085**0.5, 0.012**0.5, num_times, dtype=double) ** 2
        else:
            f = torch.cos((torch.arange(num_times + 1, dtype=double) / num_times + 0.008) / 1.008 * (math.pi / 2)) ** 2
            betas = (1 - f[1:] / f[:-1]).clamp_max(0.999)
        # abar is 1 at t = 0, before the first step.
        self._log_abar = torch.cat([torch.zeros(1, dtype=double), torch.log1p(-betas).cumsum(0)])

    def log_abar(self, t: Tensor) -> Tensor:
        """log abar at any t in [0, 1]."""
        k = (t.double() * self.num_times).clamp(0, self.num_times)
        # Times that stand for a step are that step, whatever rounding did to them.
        k = torch.where((k - k.round()).abs() < 1e-6, k.round(), k)
        low = k.floor().long().clamp_max(self.num_times - 1)
        table = self._log_abar.to(t.device)
        return torch.lerp(table[low], table[low + 1], k - low)

    def alpha(self, t: Tensor) -> Tensor:
        return (0.5 * self.log_abar(t)).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(self.log_abar(t))).sqrt()

    def betas(self) -> Tensor:
        """[T] float64: the variance that every step adds."""
        return -torch.expm1(self._log_abar.diff())

    def index(self, t: Tensor) -> Tensor:
        """k = t T - 1, the number that networks of this chain are told; whole for its own steps."""
        return t * self.num_times - 1

    def times(self, num_steps: int) -> Tensor:
        """num_steps of the chain's steps, evenly spaced with both ends, and 0."""
        if num_steps == 1:
            return torch.tensor([1.0, 0.0], dtype=torch.float64)
        gap = (self.num_times - 1) / (num_steps - 1)
        steps = [round(i * gap) for i in reversed(range(num_steps))]
        return torch.tensor([*((k + 1) / self.num_times for k in steps), 0.0], dtype=torch.float64)


class Exploding:
    """alpha = 1, sigma from sigma_max at t = 1 along a power curve to sigma_min at t = EDGE and straight to 0 (Karras et al., "EDM", 2022, eq. 5)."""

    EDGE = least = 1e-3

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0):
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        curve = (low + (t - self.EDGE).clamp_min(0) / (1 - self.EDGE) * (high - low)) ** self.rho
        return torch.where(t < self.EDGE, self.sigma_min / self.EDGE * t, curve)

    def times(self, num_steps: int) -> Tensor:
        zero = torch.zeros(1, dtype=torch.float64)
        return torch.cat([torch.linspace(1, self.EDGE, num_steps, dtype=torch.float64), zero])


def along(values: Tensor, like: Tensor) -> Tensor:
    """[] or [B] -> the same numbers, in the precision and with the axes of like [B, ...]."""
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1)) if values.ndim else values.to(like.dtype)
