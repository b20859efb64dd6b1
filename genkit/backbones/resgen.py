"""Transformer over partly known residual tokens that says what their unknown rest adds up to (Kim et al., "Efficient Generative Modeling with Residual
Vector Quantization-Based Tokens" (ResGen), ICML 2025).

No code was released. Blocks as in genkit.backbones.masked (adaLN-zero, any mixer); that the network is told how many levels are known, and the numbers of
components and of the rank, are choices made here.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from genkit.backbones.masked import Block
from genkit.errors import UsageError
from genkit.interfaces import Cache, Cond, Layout
from genkit.nn.embed import LabelEmbedding, PositionEmbedding, SincosPositions
from genkit.registry import MixerSpec, maker

ATTENTION: MixerSpec = {"type": "attention"}
LEAST_SIGMA = 0.02  # of vectors of unit variance; a mixture in many dimensions would make it ever smaller


class ResGen(ModelMixin, ConfigMixin):
    """Sums of known codes [B, C, *grid], numbers of known levels -> a mixture per place for the sum of the others (genkit/nn/mixture.py).

    Args:
        channels: C, of the codes.
        num_levels: Q of the tokenizer.
        num_classes: classes that cond["label"] counts; 0 = unconditional.
        grid: tokens per axis while training.
        mixer: a part, or a list of parts repeated through the depth.
        components, rank: of the mixture.
        positions: "learned" one vector per place; "sincos" fixed waves, fits any grid.
    """

    _supports_gradient_checkpointing = True
    answers = "sums of codes"

    @register_to_config
    def __init__(
        self,
        *,
        channels: int,
        num_levels: int,
        num_classes: int,
        grid: tuple[int, ...],
        dim: int = 192,
        depth: int = 6,
        mixer: MixerSpec = ATTENTION,
        mlp_ratio: float = 4.0,
        components: int = 32,
        rank: int = 8,
        dropout: float = 0.0,
        positions: Literal["learned", "sincos"] = "learned",
    ):
        super().__init__()
        for name, value in (("depth", depth), ("components", components), ("rank", rank)):
            if value < 1:
                raise UsageError(f"backbone.{name}={value} must be at least 1")
        if num_levels < 1:
            raise UsageError("backbone.type=resgen needs a tokenizer of ids, such as rvq; this one has none")
        make_mixer = maker("mixer", mixer)
        self.gradient_checkpointing = False
        self.sizes = (components, components * rank, channels, channels, 1)
        self.embed = nn.Linear(channels, dim)
        self.level = nn.Embedding(num_levels + 1, dim)
        self.label = LabelEmbedding(num_classes=num_classes, dim=dim)
        Positions = PositionEmbedding if positions == "learned" else SincosPositions
        self.position = Positions(grid=tuple(grid), dim=dim)
        self.blocks = nn.ModuleList(
            Block(dim=dim, mixer=make_mixer(dim=dim, layer=i), mlp_ratio=mlp_ratio, dropout=dropout)
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.to_mixture = nn.Linear(dim, sum(self.sizes))
        self.basis = nn.Parameter(torch.randn(rank, channels) / math.sqrt(rank))
        nn.init.normal_(self.level.weight, std=0.02)
        # At first: components alike in weight, their means as far apart as what they stand for, sigma 1.
        nn.init.zeros_(self.to_mixture.weight)
        nn.init.zeros_(self.to_mixture.bias)
        with torch.no_grad():
            self.to_mixture.bias[components : components * (1 + rank)].normal_()
            self.to_mixture.bias[-1] = math.log(1 / LEAST_SIGMA - 1)  # softplus of it is log(1 / LEAST_SIGMA)

    def forward(
        self,
        x: Tensor,
        t: Tensor | None,
        cond: Cond,
        layout: Layout,
        cache: Cache | None = None,
        num_known: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """The tensors of a Mixture for vectors of unit variance.

        Args:
            x: sums of known codes [B, C, *grid].
            t: not used.
            cond: "label" [B] int64, -1 = null class.
            layout: coords of the N = prod(grid) tokens.
            num_known: [B, N] int64, known levels of every place.
            positions: [P] int64, numbers of tokens in the flattened batch [B * N]: the others are left out, [P, ...] instead of [B, N, ...].
        """
        B = len(x)
        assert num_known is not None
        h = self.embed(x.flatten(2).mT) + self.level(num_known) + self.position(layout)  # [B, N, D]
        c = nn.functional.silu(self.label(cond, B))
        for i, block in enumerate(self.blocks):
            chosen = positions if i == len(self.blocks) - 1 else None
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                h = self._gradient_checkpointing_func(block, h, c, layout, None, chosen)
            else:
                h = block(h, c, layout, None, chosen)
        logits, low, shift, log_scale, sigma = self.to_mixture(self.norm(h)).split(self.sizes, dim=-1)
        log_sigma = math.log(LEAST_SIGMA) + nn.functional.softplus(sigma.squeeze(-1))
        return logits, low.unflatten(-1, (self.sizes[0], -1)), shift, log_scale, log_sigma, self.basis
