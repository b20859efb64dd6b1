"""The perceptron whose hidden values are gated (Shazeer, "GLU Variants Improve Transformer", 2020)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import gelu, silu


class GatedMLP(nn.Module):
    """down(act(gate(x)) * value(x)), [..., dim] -> [..., out].

    Args:
        hidden: channels between.
        act: "silu" (SwiGLU), or "gelu" in its tanh form.
        bias: of both linear maps.
        out: channels of the result; by default dim.
    """

    def __init__(
        self, *, dim: int, hidden: int, act: Literal["silu", "gelu"] = "silu", bias: bool = True, out: int | None = None
    ):
        super().__init__()
        self.act = act
        self.up = nn.Linear(dim, 2 * hidden, bias=bias)  # rows: gate, value
        self.down = nn.Linear(hidden, dim if out is None else out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down((silu(gate) if self.act == "silu" else gelu(gate, approximate="tanh")) * value)
