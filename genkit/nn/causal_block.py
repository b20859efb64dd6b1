"""The block of GPT: a causal mixer and a perceptron, a layer norm before each (Radford et al., "GPT-2", 2019)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from genkit.errors import UsageError
from genkit.interfaces import Cache, Layout
from genkit.nn.dropout import Dropout
from genkit.nn.mlp import MLP
from genkit.registry import MixerSpec, maker


class CausalBlock(nn.Module):
    """h [B, N, D] -> the same.

    Args:
        dropout: on both branches.
    """

    def __init__(self, *, dim: int, mixer: nn.Module, mlp_ratio: float = 4.0, dropout: float = 0.0):
        super().__init__()
        self.mix_norm, self.mixer = nn.LayerNorm(dim), mixer
        self.mlp_norm, self.mlp = nn.LayerNorm(dim), MLP(dim=dim, mlp_ratio=mlp_ratio)
        self.dropout = Dropout(dropout)

    def forward(self, h: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        h = h + self.dropout(self.mixer(self.mix_norm(h), layout, cache))
        return h + self.dropout(self.mlp(self.mlp_norm(h)))


def causal_blocks(
    mixer: MixerSpec, first: int, depth: int, *, dim: int, mlp_ratio: float, dropout: float
) -> nn.ModuleList:
    """Layers number first .. first + depth - 1. Raises UsageError for a mixer that sees ahead."""
    make_mixer = maker("mixer", mixer)
    return nn.ModuleList(
        CausalBlock(dim=dim, mixer=causal(make_mixer(dim=dim, layer=i), i), mlp_ratio=mlp_ratio, dropout=dropout)
        for i in range(first, first + depth)
    )


def causal(mixer: Any, layer: int) -> Any:
    """The mixer. Raises UsageError for one that sees ahead."""
    if not mixer.is_causal:
        word = type(mixer).__module__.rpartition(".")[2]
        raise UsageError(
            f"backbone.mixer of layer {layer}: {word} sees tokens that are not drawn yet; set is_causal: true, or take a causal mixer"
        )
    return mixer


def init_normal(module: nn.Module) -> None:
    """Every linear map and table N(0, 0.02), biases 0: as GPT-2 and its followers."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
