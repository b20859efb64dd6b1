"""An adaptive solver of fifth order (Dormand and Prince, 1980), every sample with steps of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genkit.errors import GenkitError, UsageError
from genkit.interfaces import OnStep, Predict
from genkit.rng import Rng
from genkit.samplers.steps import start_at

# The tableau: stages' places, their weights, the fifth-order result (which is the last stage: it serves as the first of the next step) and the difference
# to the embedded fourth-order one.
_C = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_A: tuple[tuple[float, ...], ...] = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_E = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


class Dopri5:
    """Solves dy / du = noise - x0 from u = 1 to 0, where u = sigma / (alpha + sigma) and y = x / (alpha + sigma): so scaled every path is straight.

    On a path whose models do not know t = 0 the solver ends where they begin, and x0 as predicted there is the result. Step sizes follow each sample's own error, so that sample i is the same in any batch.

    Args:
        rtol, atol: a step is accepted when the root mean square of error / (atol + rtol |y|) is at most 1.
        num_steps: most steps, tried ones included; each calls the model six times.
    """

    is_adaptive = (
        True  # samples are at times of their own, and a step may be tried again: nothing can be carried between calls
    )

    def __init__(self, *, rtol: float = 1e-3, atol: float = 1e-5, num_steps: int = 1000):
        if rtol <= 0 or atol <= 0:
            raise UsageError(f"sampler.rtol={rtol} and sampler.atol={atol} must be positive")
        if num_steps < 1:
            raise UsageError(f"sampler.num_steps={num_steps} must be at least 1")
        self.rtol, self.atol, self.num_steps = rtol, atol, num_steps

    def __call__(self, predict: Predict, start: Tensor, rng: Rng, on_step: OnStep | None = None) -> Tensor:
        """As Euler's. Raises GenkitError when num_steps are not enough."""
        path = predict.path
        x = start_at(path, start)
        t = path.times(1)[0].expand(len(x)).to(x.device)
        u = _place(path, t)  # [B], 1 or close to it
        y = x / _along(path.alpha(t) + path.sigma(t), x)
        end = float(_place(path, torch.tensor(path.least, dtype=torch.float64)))
        h = (u - end) / 20
        slope = self._slope(predict, y, t)
        for step in range(self.num_steps):
            h = torch.minimum(h, u - end)
            slopes = [slope]
            for place, weights in zip(_C[1:], _A[1:], strict=True):
                ahead = y - _along(h, y) * sum(w * k for w, k in zip(weights, slopes, strict=True) if w)
                slopes.append(self._slope(predict, ahead, _time(path, (u - place * h).clamp_min(end))))
            error = _along(h, y) * sum(e * k for e, k in zip(_E, slopes, strict=True) if e)
            scaled = error / (self.atol + self.rtol * torch.maximum(y.abs(), ahead.abs()))
            size = scaled.flatten(1).double().square().mean(1).sqrt()  # [B]
            is_good = (size <= 1) & (u > end)
            y = torch.where(_along(is_good, y) > 0, ahead, y)
            slope = torch.where(_along(is_good, y) > 0, slopes[-1], slope)
            u = torch.where(is_good, torch.where(u - h <= end + 1e-12, end, u - h), u)
            h = h * (0.9 * size.clamp_min(1e-10) ** -0.2).clamp(0.2, 5)
            if on_step is not None:
                on_step(step, self.num_steps, y)
            if not bool((u > end).any()):
                return y if end == 0 else self._estimate(predict, y, _time(path, u))[0]
        raise GenkitError(
            f"dopri5: {self.num_steps} steps did not reach rtol={self.rtol:g}, atol={self.atol:g}; allow more steps or more error"
        )

    def _slope(self, predict: Predict, y: Tensor, t: Tensor) -> Tensor:
        x0, noise = self._estimate(predict, y, t)
        return noise - x0

    def _estimate(self, predict: Predict, y: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        path = predict.path
        return predict(y * _along(path.alpha(t) + path.sigma(t), y), t)[:2]


def _place(path: Any, t: Tensor) -> Tensor:
    return path.sigma(t) / (path.alpha(t) + path.sigma(t))


def _time(path: Any, u: Tensor) -> Tensor:
    """t [B] where a path has u = sigma / (alpha + sigma), which grows with t: by halving [0, 1]."""
    low, high = torch.zeros_like(u), torch.ones_like(u)
    for _ in range(50):
        middle = 0.5 * (low + high)
        is_below = _place(path, middle) < u
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    return torch.where(u <= 0, 0.0, high)


def _along(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))
