"""From one time to the next: the numbers every step along a path is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """A step from t to s < t. Signal and noise levels are plain numbers: nothing of a step is computed in the precision of the images."""

    t: Tensor  # [] float64
    s: Tensor
    alpha_t: float
    sigma_t: float
    alpha_s: float
    sigma_s: float


def interval(path: Any, times: Tensor, step: int) -> Interval:
    """The step number `step` between times [num_steps + 1]."""
    t, s = times[step], times[step + 1]
    return Interval(t, s, float(path.alpha(t)), float(path.sigma(t)), float(path.alpha(s)), float(path.sigma(s)))


def start_at(path: Any, noise: Tensor) -> Tensor:
    """The state at t = 1: noise as strong as the path ends with. (A chain that ends a hair below 1 starts from 1, as DDPM does.)"""
    strength = float(path.sigma(path.times(1)[0]))
    return noise * strength if strength > 1 else noise
