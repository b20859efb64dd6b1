"""Preconditioned denoising at noise levels drawn log-normally (Karras et al., "Elucidating the Design Space of Diffusion Models", 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.interfaces import Cond, Layout, Predict
from genkit.nn.paths import Exploding, Predictor, along
from genkit.nn.told import once
from genkit.objectives.denoising import noise_like, per_sample
from genkit.objectives.dropping import drop
from genkit.rng import Rng


class Edm:
    """D(x; sigma) = c_skip x + c_out F(c_in x, c_noise), trained by lambda(sigma) |D - x0|^2 with lambda = 1 / c_out^2 (table 1).

    Args:
        sigma_data: standard deviation of the data: 1, since tokenizers scale their latents; 0.5 in the paper, which does not.
        log_mean, log_std: of ln sigma while training.
        sigma_min, sigma_max, rho: of the sampling times, see nn.paths.Exploding.
        cond_drop: probability in [0, 1] that a label is dropped.
    """

    target = "z"
    asks = "noisy latents"

    def __init__(
        self,
        *,
        sigma_data: float = 1.0,
        log_mean: float = -1.2,
        log_std: float = 1.2,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        cond_drop: float = 0.1,
    ):
        if not 0 <= cond_drop <= 1:
            raise UsageError(f"objective.cond_drop={cond_drop} must be in [0, 1]")
        for name, value in (("sigma_data", sigma_data), ("log_std", log_std), ("rho", rho)):
            if value <= 0:
                raise UsageError(f"objective.{name}={value} must be positive")
        if not 0 < sigma_min < sigma_max:
            raise UsageError(f"objective.sigma_min={sigma_min} must be above 0 and below sigma_max={sigma_max}")
        self.path = Exploding(sigma_min, sigma_max, rho)
        self.sigma_data, self.log_mean, self.log_std, self.cond_drop = sigma_data, log_mean, log_std, cond_drop

    def __call__(self, model: Any, target: Tensor, cond: Cond, layout: Layout, rng: Rng) -> dict[str, Tensor]:
        """{"denoising": [B]} for latents target [B, C, *grid]."""
        sigma = (self.log_mean + self.log_std * rng.fork("time").normal().double()).exp()  # [B]
        x_t = target + along(sigma, target) * noise_like(target, layout, rng)
        x0 = self.denoise(model, x_t, sigma, drop(cond, self.cond_drop, rng), layout)
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        return {"denoising": weight.float() * per_sample((x0 - target).square(), layout)}

    def denoise(self, model: Any, x_t: Tensor, sigma: Tensor, cond: Cond, layout: Layout) -> Tensor:
        """D(x_t; sigma) [B, C, *grid], sigma [] or [B]."""
        total = torch.sqrt(sigma**2 + self.sigma_data**2)
        c_skip, c_out = self.sigma_data**2 / total**2, sigma * self.sigma_data / total
        c_noise = (sigma.log() / 4).float().expand(len(x_t))
        found = model(along(1 / total, x_t) * x_t, c_noise, cond, layout)[:, : x_t.shape[1]].float()
        return along(c_skip, x_t) * x_t + along(c_out, x_t) * found

    def predictor(self, model: Any, cond: Cond, layout: Layout) -> Predict:
        """(x_t [B, C, *grid], t [] or [B]) -> (x0, noise)."""
        cond = once(model, cond)

        def predict(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            sigma = self.path.sigma(t)
            x0 = self.denoise(model, x_t, sigma, cond, layout)
            return x0, (x_t - x0) / along(sigma, x_t)

        return Predictor(self.path, predict)
