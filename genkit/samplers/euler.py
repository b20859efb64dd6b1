"""The first-order step along the path: DDIM on a variance-preserving path (Song et al., 2021, eq. 12), Euler on a straight one."""

from __future__ import annotations

from torch import Tensor

from genkit.errors import UsageError
from genkit.interfaces import OnStep, Predict
from genkit.rng import Rng
from genkit.samplers.steps import interval, start_at


class Euler:
    """x_s = alpha_s x0 + sigma_s noise, with what is predicted at t.

    Args:
        num_steps: calls of the model, >= 1.
    """

    def __init__(self, *, num_steps: int = 50):
        if num_steps < 1:
            raise UsageError(f"sampler.num_steps={num_steps} must be at least 1")
        self.num_steps = num_steps

    def __call__(self, predict: Predict, start: Tensor, rng: Rng, on_step: OnStep | None = None) -> Tensor:
        """x0 [B, C, *grid].

        Args:
            predict: (x_t, t []) -> (x0, noise), with `path`.
            start: standard normal noise [B, C, *grid].
            on_step: is shown the estimate of x0.
        """
        times = predict.path.times(self.num_steps)
        x = start_at(predict.path, start)
        for step in range(self.num_steps):
            at = interval(predict.path, times, step)
            x0, noise = predict(x, at.t)[:2]
            x = at.alpha_s * x0 + at.sigma_s * noise
            if on_step is not None:
                on_step(step, self.num_steps, x0)
        return x
