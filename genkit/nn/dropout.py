"""Dropout (Srivastava et al., 2014) whose mask is cheap on a CPU.

torch draws a double per element there, one after the other; 16 random bits are enough to decide. A step of a small transformer spends less than
half the time on it. Elsewhere torch's own kernel is used.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genkit.errors import UsageError

_RANGE = 2**16


class Dropout(nn.Module):
    """Zeroes each element with probability `rate`, rounded to 2^-16, and scales the others so that the mean stays.

    Draws from torch's global generator, as nn.Dropout does. Off in eval mode. Raises UsageError for a rate outside [0, 1).
    """

    def __init__(self, rate: float):
        super().__init__()
        if not 0 <= rate < 1:
            raise UsageError(f"dropout={rate} must be at least 0 and below 1")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        if x.device.type != "cpu":
            return nn.functional.dropout(x, self.rate)
        dropped = round(self.rate * _RANGE)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        kept = words[: x.numel()].view(x.shape) >= dropped - _RANGE // 2
        return x * kept.to(x.dtype).mul_(_RANGE / max(1, _RANGE - dropped))
