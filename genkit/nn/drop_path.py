"""Residual branches left out at random (Huang et al., "Deep Networks with Stochastic Depth", 2016)."""

from __future__ import annotations

from torch import Tensor, nn

from genkit.errors import UsageError


class DropPath(nn.Module):
    """x [B, ...] with whole samples zeroed at probability `rate` and the others scaled so that the mean stays. Off in eval mode.

    Raises UsageError for a rate outside [0, 1).
    """

    def __init__(self, rate: float):
        super().__init__()
        if not 0 <= rate < 1:
            raise UsageError(f"drop_path={rate} must be at least 0 and below 1")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        kept = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * kept.div_(1 - self.rate)
