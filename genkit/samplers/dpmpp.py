"""DPM-Solver++ (2M) (Lu et al., 2022, algorithm 2): second order for one call of the model per step, by remembering the call before."""

from __future__ import annotations

import math

from torch import Tensor

from genkit.errors import UsageError
from genkit.interfaces import OnStep, Predict
from genkit.rng import Rng
from genkit.samplers.steps import interval, start_at


class Dpmpp:
    """x_s = sigma_s / sigma_t x_t + alpha_s (1 - e^-h) D, D = x0 + (x0 - x0 before) / (2 r), in lambda = log(alpha / sigma).

    First order on the first step and on the last, whose h is infinite.

    Args:
        num_steps: calls of the model, >= 1.
    """

    def __init__(self, *, num_steps: int = 20):
        if num_steps < 1:
            raise UsageError(f"sampler.num_steps={num_steps} must be at least 1")
        self.num_steps = num_steps

    def __call__(self, predict: Predict, start: Tensor, rng: Rng, on_step: OnStep | None = None) -> Tensor:
        """As Euler's."""
        times = predict.path.times(self.num_steps)
        x = start_at(predict.path, start)
        before: tuple[Tensor, float] | None = None  # x0 of the last step, and its h
        for step in range(self.num_steps):
            at = interval(predict.path, times, step)
            h = _log_ratio(at.alpha_s, at.sigma_s) - _log_ratio(at.alpha_t, at.sigma_t)
            x0 = predict(x, at.t)[0]
            direction = x0
            if before is not None and math.isfinite(h):
                # Where the step before began without any signal its h is infinite and says nothing of a slope: no correction.
                direction = x0 + 0.5 * h / before[1] * (x0 - before[0])
            x = at.sigma_s / at.sigma_t * x - at.alpha_s * math.expm1(-h) * direction
            before = x0, h
            if on_step is not None:
                on_step(step, self.num_steps, x0)
        return x


def _log_ratio(alpha: float, sigma: float) -> float:
    """log(alpha / sigma) with its limits at both ends of a path."""
    if alpha == 0:
        return -math.inf
    return math.inf if sigma == 0 else math.log(alpha / sigma)
