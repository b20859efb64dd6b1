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
        null_class: see LabelEmbedding.
        act: False leaves the SiLU out, for modulations that have none.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        dim: int,
        time_scale: float = 1.0,
        freq_shift: int = 0,
        null_class: bool = True,
        act: bool = True,
    ):
        super().__init__()
        self.act = act
        self.time = TimeEmbedding(dim=dim, shift=freq_shift, scale=time_scale)
        self.label = LabelEmbedding(num_classes=num_classes, dim=dim, null_class=null_class)
        nn.init.normal_(self.label.table.weight, std=0.02)  # of the size of the time embedding it is added to

    def forward(self, t: Tensor | None, cond: Cond, batch_size: int) -> Tensor:
        c = self.label(cond, batch_size)
        c = c if t is None else c + self.time(t, batch_size)
        return nn.functional.silu(c) if self.act else c
