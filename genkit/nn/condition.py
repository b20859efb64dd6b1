"""What adaptive layer norms are told: time and class as one vector (Peebles and Xie, "DiT", 2023)."""

from __future__ import annotations

from torch import Tensor, nn

from genkit.interfaces import Cond
from genkit.nn.embed import LabelEmbedding
from genkit.nn.timestep import TimeEmbedding


class Condition(nn.Module):
    """SiLU(time(t) + label(cond)), [B, dim]. Where t is None, the class alone.

    Every modulation of the paper has this SiLU of its own; they are all the same, so it is computed once.

    Args:
        time_scale, freq_shift: see TimeEmbedding.
    """

    def __init__(self, *, num_classes: int, dim: int, time_scale: float = 1.0, freq_shift: int = 0):
        super().__init__()
        self.time = TimeEmbedding(dim=dim, shift=freq_shift, scale=time_scale)
        self.label = LabelEmbedding(num_classes=num_classes, dim=dim)
        nn.init.normal_(self.label.table.weight, std=0.02)  # of the size of the time embedding it is added to

    def forward(self, t: Tensor | None, cond: Cond, batch_size: int) -> Tensor:
        c = self.label(cond, batch_size)
        return nn.functional.silu(c if t is None else c + self.time(t, batch_size))
