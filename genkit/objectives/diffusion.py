"""Denoising along the discrete chain of DDPM (Ho et al., 2020), with learned variances (Nichol and Dhariwal, 2021) as DiT trains it."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.interfaces import Cond, Layout, Predict
from genkit.nn.paths import Discrete, Predictor, along
from genkit.nn.told import once
from genkit.objectives.denoising import noise_like, per_sample
from genkit.objectives.dropping import drop
from genkit.rng import Rng


class Diffusion:
    """Mean squared error of what the network predicts, and where it has variances the variational bound for these alone.

    The network is told the number k = 0 .. T - 1 of the step. With twice as many channels as the latents, the second half are variances: v between the
    smallest and the largest the posterior can have, log Sigma = f log beta_k + (1 - f) log beta~_k with f = (v + 1) / 2 (eq. 15). Their loss is the KL of
    the posterior in bits per number, which sees the prediction detached and is not multiplied by T.

    Args:
        prediction: "noise" (DDPM), "v" = alpha noise - sigma x0 (Salimans and Ho, 2022), or "x0".
        schedule, num_times: of the chain, see nn.paths.Discrete.
        min_snr: gamma of Hang et al., "Min-SNR", 2023: the weight, in terms of x0, is min(SNR, gamma); None = 1 in terms of what is predicted.
        cond_drop: probability in [0, 1] that a label is dropped.
    """

    target = "z"
    asks = "noisy latents"

    def __init__(
        self,
        *,
        prediction: Literal["noise", "v", "x0"] = "noise",
        schedule: Literal["linear", "scaled_linear", "cosine"] = "linear",
        num_times: int = 1000,
        min_snr: float | None = None,
        cond_drop: float = 0.1,
    ):
        if not 0 <= cond_drop <= 1:
            raise UsageError(f"objective.cond_drop={cond_drop} must be in [0, 1]")
        if num_times < 2:
            raise UsageError(f"objective.num_times={num_times} must be at least 2")
        if min_snr is not None and min_snr <= 0:
            raise UsageError(f"objective.min_snr={min_snr} must be positive, or null")
        self.path = Discrete(schedule, num_times)
        self.prediction, self.min_snr, self.cond_drop = prediction, min_snr, cond_drop

    def __call__(self, model: Any, target: Tensor, cond: Cond, layout: Layout, rng: Rng) -> dict[str, Tensor]:
        """{"mse": [B]}, and {"vb": [B] bits per number} of a network with variances, for latents target [B, C, *grid]."""
        T = self.path.num_times
        k = rng.fork("time").integers(T)  # [B]
        t = (k + 1).double() / T
        noise = noise_like(target, layout, rng)
        alpha, sigma = along(self.path.alpha(t), target), along(self.path.sigma(t), target)
        x_t = alpha * target + sigma * noise
        out = model(x_t, k, drop(cond, self.cond_drop, rng), layout).float()
        return self.errors(out, target, x_t, noise, k, layout)

    def errors(
        self, out: Tensor, target: Tensor, x_t: Tensor, noise: Tensor, k: Tensor, layout: Layout
    ) -> dict[str, Tensor]:
        """The losses, [B], of what the network gave for x_t = alpha target + sigma noise at the steps k [B]."""
        t = (k + 1).double() / self.path.num_times
        alpha, sigma = along(self.path.alpha(t), target), along(self.path.sigma(t), target)
        found, variance = out[:, : target.shape[1]], out[:, target.shape[1] :]
        wanted = {"noise": noise, "v": alpha * noise - sigma * target, "x0": target}[self.prediction]
        losses = {"mse": self.weight(t).float() * per_sample((found - wanted).square(), layout)}
        if variance.numel():
            x0, _ = self.split(found.detach(), x_t, t)
            losses["vb"] = self.bound(x0, target, x_t, variance, k, layout)
        return losses

    def weight(self, t: Tensor) -> Tensor:
        """Of the squared error at t [B]."""
        if self.min_snr is None:
            return torch.ones_like(t)
        snr = self.path.alpha(t).square() / self.path.sigma(t).square()
        return snr.clamp_max(self.min_snr) / {"noise": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[self.prediction]

    def bound(self, x0: Tensor, target: Tensor, x_t: Tensor, fraction: Tensor, k: Tensor, layout: Layout) -> Tensor:
        """[B] bits per number: KL(q(x_{k-1} | x_k, x0) || p), and at k = 0 the likelihood of x0 in bins as wide as of 8-bit images."""
        t, s = (k + 1).double() / self.path.num_times, k.double() / self.path.num_times
        mean, log_variance = posterior(self.path, target, x_t, t, s)
        found_mean, _ = posterior(self.path, x0, x_t, t, s)
        found_log_variance = interpolated(self.path, fraction, t, s)
        kl = 0.5 * (
            found_log_variance
            - log_variance
            - 1
            + (log_variance - found_log_variance).exp()
            + (mean - found_mean).square() * (-found_log_variance).exp()
        )
        nll = _binned_nll(target, found_mean, 0.5 * found_log_variance)
        return torch.where(k == 0, per_sample(nll, layout), per_sample(kl, layout)) / math.log(2)

    def split(self, out: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, noise) from what the network gave."""
        alpha, sigma = along(self.path.alpha(t), x_t), along(self.path.sigma(t), x_t)
        if self.prediction == "noise":
            return (x_t - sigma * out) / alpha, out
        if self.prediction == "v":
            return alpha * x_t - sigma * out, sigma * x_t + alpha * out
        return out, (x_t - alpha * out) / sigma

    def predictor(self, model: Any, cond: Cond, layout: Layout) -> Predict:
        """(x_t [B, C, *grid], t [] or [B]) -> (x0, noise), and of a network with variances a third tensor, f in about [0, 1]."""
        cond = once(model, cond)

        def predict(x_t: Tensor, t: Tensor) -> tuple[Tensor, ...]:
            C = x_t.shape[1]
            out = model(x_t, self.path.index(t).float().expand(len(x_t)), cond, layout).float()
            x0, noise = self.split(out[:, :C], x_t, t)
            return (x0, noise) if out.shape[1] == C else (x0, noise, (out[:, C:] + 1) / 2)

        return Predictor(self.path, predict)


def posterior(path: Discrete, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of q(x_s | x_t, x0) for s < t (Ho et al., 2020, eq. 6 and 7). At s = 0 the variance is 0, and the one of the step before stands
    in, as in the released code."""
    alpha_t, alpha_s = path.alpha(t), path.alpha(s)
    var_t, var_s = path.sigma(t).square(), path.sigma(s).square()
    beta = -torch.expm1(path.log_abar(t) - path.log_abar(s))
    mean = along(alpha_s * beta / var_t, x_t) * x0 + along(alpha_t / alpha_s * var_s / var_t, x_t) * x_t
    return mean, along(_least_log_variance(path, t, s), x_t)


def interpolated(path: Discrete, fraction: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """log Sigma = f log beta + (1 - f) log beta~ for network outputs v = 2 f - 1 (Nichol and Dhariwal, 2021, eq. 15)."""
    most = torch.log(-torch.expm1(path.log_abar(t) - path.log_abar(s)))
    return torch.lerp(along(_least_log_variance(path, t, s), fraction), along(most, fraction), (fraction + 1) / 2)


def _least_log_variance(path: Discrete, t: Tensor, s: Tensor) -> Tensor:
    """log beta~ = log(sigma_s^2 / sigma_t^2 beta); where s = 0, of the chain's second step."""
    t, s = torch.where(s == 0, t + 1 / path.num_times, t), torch.where(s == 0, t, s)
    beta = -torch.expm1(path.log_abar(t) - path.log_abar(s))
    return torch.log(path.sigma(s).square() / path.sigma(t).square() * beta)


def _binned_nll(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """-log of the Gaussian's mass within 1/255 of x, by the tanh approximation of the normal's distribution function that the released code uses; the
    outermost bins reach to infinity."""

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    scale = (-log_std).exp()
    above, below = cdf((x - mean + 1 / 255) * scale), cdf((x - mean - 1 / 255) * scale)
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return -mass.clamp_min(1e-12).log()
