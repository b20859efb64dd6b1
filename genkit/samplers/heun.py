"""The second-order step (Karras et al., "EDM", 2022, algorithm 1), on any path."""

from __future__ import annotations

from torch import Tensor

from genkit.errors import UsageError
from genkit.interfaces import OnStep, Predict
from genkit.rng import Rng
from genkit.samplers.steps import interval, start_at


class Heun:
    """Euler's step, then again with the mean of what is predicted at both of its ends; the last step, to t = 0, stays Euler's.

    Moving from (alpha_t, sigma_t) to (alpha_s, sigma_s), x changes by the differences times the mean x0 and the mean noise: the trapezoidal rule in both,
    which is EDM's where alpha = 1 and the usual one on a straight path.

    Args:
        num_steps: steps, >= 1; the model is called 2 num_steps - 1 times.
    """

    def __init__(self, *, num_steps: int = 18):
        if num_steps < 1:
            raise UsageError(f"sampler.num_steps={num_steps} must be at least 1")
        self.num_steps = num_steps

    def __call__(self, predict: Predict, start: Tensor, rng: Rng, on_step: OnStep | None = None) -> Tensor:
        """As Euler's."""
        times = predict.path.times(self.num_steps)
        x = start_at(predict.path, start)
        for step in range(self.num_steps):
            at = interval(predict.path, times, step)
            x0, noise = predict(x, at.t)[:2]
            ahead = at.alpha_s * x0 + at.sigma_s * noise
            if step + 1 < self.num_steps:
                x0_ahead, noise_ahead = predict(ahead, at.s)[:2]
                rise, fall = 0.5 * (at.alpha_s - at.alpha_t), 0.5 * (at.sigma_s - at.sigma_t)
                ahead = x + rise * (x0 + x0_ahead) + fall * (noise + noise_ahead)
            x = ahead
            if on_step is not None:
                on_step(step, self.num_steps, x0)
        return x
