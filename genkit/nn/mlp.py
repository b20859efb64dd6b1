"""The two-layer perceptron of a transformer block."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn


class MLP(nn.Module):
    """[..., D] -> [..., D] by way of mlp_ratio * D channels and a GELU.

    The GELU is the exact one, not the tanh form of MaskGIT and DiT: the two differ by less than 5e-4, and on a CPU
    forward and backward of the exact one take less than half the time. Weights trained with the other want "tanh".
    """

    def __init__(self, *, dim: int, mlp_ratio: float, approximate: Literal["none", "tanh"] = "none", bias: bool = True):
        super().__init__()
        hidden = int(round(dim * mlp_ratio, 6))  # a ratio found by dividing gives the same number again
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.act = nn.GELU(approximate)
        self.down = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))
