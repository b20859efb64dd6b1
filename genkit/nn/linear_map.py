"""Linear maps of mixers that were published without biases."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class Projection(nn.Module):
    """[..., in_width] -> [..., out_width], no bias.

    Not an nn.Linear: blocks initialise those they contain, biases included.
    """

    def __init__(self, in_width: int, out_width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_width, in_width))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)
