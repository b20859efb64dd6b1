"""The chain's own reverse steps, with fresh noise in each (Ho et al., "DDPM", 2020, algorithm 2), on any path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.interfaces import OnStep, Predict
from genkit.rng import Rng
from genkit.samplers.steps import Interval, interval, start_at


class Ancestral:
    """x_s ~ N(mean of q(x_s | x_t, x0), variance).

    With a = alpha_t / alpha_s and v = sigma_t^2 - a^2 sigma_s^2, what x_t has more of noise than x_s: mean (a sigma_s^2 x_t + alpha_s v x0) / sigma_t^2.

    Args:
        num_steps: calls of the model, >= 1.
        variance: "small" v sigma_s^2 / sigma_t^2, exact for one image; "large" v, exact for white noise; "learned" between them as the network says (Nichol
            and Dhariwal, 2021, eq. 15).
    """

    def __init__(self, *, num_steps: int = 250, variance: Literal["small", "large", "learned"] = "small"):
        if num_steps < 1:
            raise UsageError(f"sampler.num_steps={num_steps} must be at least 1")
        self.num_steps, self.variance = num_steps, variance

    def __call__(self, predict: Predict, start: Tensor, rng: Rng, on_step: OnStep | None = None) -> Tensor:
        """As Euler's. Raises UsageError for learned variances of a model that has none."""
        times = predict.path.times(self.num_steps)
        x, fresh = start_at(predict.path, start), rng.fork("ancestral")
        for step in range(self.num_steps):
            at = interval(predict.path, times, step)
            found = predict(x, at.t)
            x0, fraction = found[0], found[2:]
            if self.variance == "learned" and not fraction:
                raise UsageError(
                    "sampler.variance=learned: this model has no variances (a backbone with learn_sigma, trained by the objective diffusion, has); "
                    "use small or large"
                )
            if at.sigma_s == 0:
                x = at.alpha_s * x0
            else:
                a = at.alpha_t / at.alpha_s
                more = at.sigma_t**2 - (a * at.sigma_s) ** 2
                mean = (a * at.sigma_s**2 * x + at.alpha_s * more * x0) / at.sigma_t**2
                x = mean + self.strength(at, more, fraction) * fresh.normal(*x.shape[1:]).to(x)
            if on_step is not None:
                on_step(step, self.num_steps, x0)
        return x

    def strength(self, at: Interval, more: float, fraction: Sequence[Tensor]) -> Tensor | float:
        """The standard deviation of the fresh noise."""
        small = math.sqrt(more) * at.sigma_s / at.sigma_t
        if self.variance == "learned":
            return torch.exp(math.log(small) + fraction[0] * (0.5 * math.log(more) - math.log(small)))
        return small if self.variance == "small" else math.sqrt(more)
