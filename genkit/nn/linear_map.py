"""Linear maps of mixers, which most publications give no biases."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class Projection(nn.Module):
    """[..., in_width] -> [..., out_width]; a bias only where asked, 0 at first.

    Not an nn.Linear: blocks initialise those they contain, biases included.
    """

    bias: nn.Parameter | None

    def __init__(self, in_width: int, out_width: int, has_bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_width, in_width))
        nn.init.xavier_uniform_(self.weight)
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_width)) if has_bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
