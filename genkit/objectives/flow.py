"""Velocities along a path from data to noise (Lipman et al., "Flow Matching", 2023; Liu et al., "Rectified Flow", 2022; Ma et al., "SiT", 2024)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.interfaces import Cond, Layout, Predict
from genkit.nn.paths import Predictor, Straight, Trigonometric, along
from genkit.nn.told import once
from genkit.objectives.denoising import noise_like, per_sample
from genkit.objectives.dropping import drop
from genkit.rng import Rng

_LEAST_SIGMA = 0.05  # below it a network that gives x0 is not asked for more: its error would count without bound (Li and He, 2025)


class Flow:
    """Mean squared error of the velocity dx_t / dt = alpha'(t) x0 + sigma'(t) noise.

    Args:
        predicts: what the network gives, "velocity", or "x0", of which the velocity is made (Li and He, "Back to Basics: Let Denoising Generative Models
            Denoise", 2025). Noise fills all of a patch and must pass through the network to be in a velocity; clean data that are smooth need few numbers, so
            that patches may have more of them than a token has channels.
        path: "straight" (rectified flow), or "trigonometric" of constant variance (SiT's GVP).
        time: how t is drawn while training. "uniform", or "logit_normal" with time_mean and time_std (Esser et al., 2024, eq. 19; a larger mean sees more
            noise).
        cond_drop: probability in [0, 1] that a label is dropped, which trains the null class.
        towards: what the network's time and velocity mean. "noise": as here, t = 1 is noise. "data": it is told 1 - t and gives -dx_t / dt, as the
            weights of SiT and FiTv2. An x0 is the same in both.
        shift: of the sampling times, see nn.paths.Straight.
    """

    target = "z"
    asks = "noisy latents"

    def __init__(
        self,
        *,
        predicts: Literal["velocity", "x0"] = "velocity",
        path: Literal["straight", "trigonometric"] = "straight",
        time: Literal["uniform", "logit_normal"] = "uniform",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        cond_drop: float = 0.1,
        towards: Literal["noise", "data"] = "noise",
        shift: float = 1.0,
    ):
        if not 0 <= cond_drop <= 1:
            raise UsageError(f"objective.cond_drop={cond_drop} must be in [0, 1]")
        for name, value in (("time_std", time_std), ("shift", shift)):
            if value <= 0:
                raise UsageError(f"objective.{name}={value} must be positive")
        self.path = Straight(shift) if path == "straight" else Trigonometric(shift)
        self.time, self.time_mean, self.time_std = time, time_mean, time_std
        self.cond_drop, self.towards, self.predicts = cond_drop, towards, predicts

    def __call__(self, model: Any, target: Tensor, cond: Cond, layout: Layout, rng: Rng) -> dict[str, Tensor]:
        """{"velocity": [B]} for latents target [B, C, *grid]."""
        t = self.draw_time(rng)  # [B]
        noise = noise_like(target, layout, rng)
        x_t = along(self.path.alpha(t), target) * target + along(self.path.sigma(t), target) * noise
        d_alpha, d_sigma = self.path.slopes(t)
        velocity = (
            along(d_alpha, target) * target + along(d_sigma, target) * noise
            if self.predicts == "velocity"
            else self.towards_noise(target, x_t, t)
        )
        found = self.velocity(model, x_t, t, drop(cond, self.cond_drop, rng), layout)
        return {"velocity": per_sample((found.float() - velocity).square(), layout)}

    def draw_time(self, rng: Rng) -> Tensor:
        """t [B] float64."""
        if self.time == "uniform":
            return rng.fork("time").uniform().double()
        return torch.sigmoid(self.time_mean + self.time_std * rng.fork("time").normal().double())

    def velocity(self, model: Any, x_t: Tensor, t: Tensor, cond: Cond, layout: Layout) -> Tensor:
        """dx_t / dt [B, C, *grid], as it is trained."""
        out = self.ask(model, x_t, t, cond, layout)
        return out if self.predicts == "velocity" else self.towards_noise(out, x_t, t)

    def towards_noise(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The velocity at x_t of a path that began at x0; smaller where there is hardly any noise."""
        d_alpha, d_sigma = self.path.slopes(t)
        share = d_sigma / self.path.sigma(t).clamp_min(_LEAST_SIGMA)
        return along(d_alpha - share * self.path.alpha(t), x_t) * x0 + along(share, x_t) * x_t

    def ask(self, model: Any, x_t: Tensor, t: Tensor, cond: Cond, layout: Layout) -> Tensor:
        """What the network gives, x0 or velocity [B, C, *grid]. A network with variances beside has them cut off: a flow has no use for them."""
        told = (t if self.towards == "noise" else 1 - t).float().expand(len(x_t))
        out = model(x_t, told, cond, layout)[:, : x_t.shape[1]]
        return -out if self.towards == "data" and self.predicts == "velocity" else out

    def predictor(self, model: Any, cond: Cond, layout: Layout) -> Predict:
        """(x_t [B, C, *grid], t [] or [B]) -> (x0, noise)."""
        cond = once(model, cond)

        def predict(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            out = self.ask(model, x_t, t, cond, layout).float()
            alpha, sigma = along(self.path.alpha(t), x_t), along(self.path.sigma(t), x_t)
            if self.predicts == "x0":
                return out, (x_t - alpha * out) / sigma
            d_alpha, d_sigma = (along(slope, x_t) for slope in self.path.slopes(t))
            # x_t and v are two equations in x0 and noise; their determinant is 1, or pi / 2.
            determinant = alpha * d_sigma - d_alpha * sigma
            return (d_sigma * x_t - sigma * out) / determinant, (alpha * out - d_alpha * x_t) / determinant

        return Predictor(self.path, predict)
