"""Euler-Maruyama on the reverse stochastic equation (Ma et al., "SiT", 2024, section 3.3; Song et al., 2021)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.interfaces import OnStep, Predict
from genkit.rng import Rng
from genkit.samplers.steps import interval, start_at


class Sde:
    """Euler's step plus (t - s) w score, and fresh noise of variance 2 w (t - s): any w >= 0 leaves the marginals as they are.

    The score is -noise / sigma. The last step, from t = last to 0, is Euler's alone.

    Args:
        num_steps: calls of the model, >= 2.
        diffusion: w(t). "sigma" sigma(t), SiT's default; "linear" t; "constant" 1.
        scale: multiplies w.
        last: where the noiseless last step begins, in (0, 1); 0.04 in SiT.
    """

    def __init__(
        self,
        *,
        num_steps: int = 250,
        diffusion: Literal["sigma", "linear", "constant"] = "sigma",
        scale: float = 1.0,
        last: float = 0.04,
    ):
        if num_steps < 2:
            raise UsageError(f"sampler.num_steps={num_steps} must be at least 2")
        if not 0 < last < 1 or scale < 0:
            raise UsageError(f"sampler.last={last} must be in (0, 1) and sampler.scale={scale} not negative")
        self.num_steps, self.diffusion, self.scale, self.last = num_steps, diffusion, scale, last

    def __call__(self, predict: Predict, start: Tensor, rng: Rng, on_step: OnStep | None = None) -> Tensor:
        """As Euler's."""
        zero = torch.zeros(1, dtype=torch.float64)
        times = torch.cat([torch.linspace(1, self.last, self.num_steps, dtype=torch.float64), zero])
        x, fresh = start_at(predict.path, start), rng.fork("sde")
        for step in range(self.num_steps):
            at = interval(predict.path, times, step)
            x0, noise = predict(x, at.t)[:2]
            drawn = at.alpha_s * x0 + at.sigma_s * noise
            if step + 1 < self.num_steps:
                w = self.scale * {"sigma": at.sigma_t, "linear": float(at.t), "constant": 1.0}[self.diffusion]
                h = float(at.t - at.s)
                drawn = drawn - h * w / at.sigma_t * noise + math.sqrt(2 * w * h) * fresh.normal(*x.shape[1:]).to(x)
            x = drawn
            if on_step is not None:
                on_step(step, self.num_steps, x0)
        return x
