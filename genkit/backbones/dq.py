"""Where and what in turn: two causal transformers, one on top of the other, for ids of varying density.

Huang et al., "Towards Accurate Image Coding: Improved Autoregressive Image Generation with Dynamic Vector Quantization" (DQ-Transformer), CVPR 2023,
section 3.3; the network as in CrossmodalGroup/DynamicVectorQuantization (StackGPT). Differences: one table of positions with rows for every grain, the
sequence of genkit.nn.grain_sequence, and logits of positions only where more than one may come next.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from genkit.errors import UsageError
from genkit.interfaces import Cache, Cond, Layout
from genkit.nn.causal_block import causal_blocks, init_normal
from genkit.nn.dropout import Dropout
from genkit.nn.embed import LabelEmbedding
from genkit.nn.grain_sequence import GrainSequence
from genkit.registry import MixerSpec

ATTENTION: MixerSpec = {"type": "attention", "num_heads": 4, "qk_norm": False, "rope": False, "is_causal": True}


class DQ(ModelMixin, ConfigMixin):
    """Pairs (position, content) -> logits of the position of each pair given the pairs before it, and of its content given its position too.

    Args:
        codebook_size: S.
        num_classes: classes that cond["label"] counts; 0 = unconditional.
        grid: cells per axis of the fine grid.
        num_grains: of the tokenizer, None if it has none.
        dim, position_depth, content_depth: 1024, 6 and 18 with 8 heads in the paper.
        mixer: a causal part, or a list of parts repeated through the depth of both.
        mlp_ratio: hidden channels of the perceptrons per channel.
        dropout: on the embedded pairs and both residual branches.

    Raises: UsageError for a tokenizer without grains, and for a mixer that sees ahead.
    """

    answers = "codes in turn"

    @register_to_config
    def __init__(
        self,
        *,
        codebook_size: int,
        num_classes: int,
        grid: tuple[int, ...],
        num_grains: int | None,
        dim: int = 192,
        position_depth: int = 2,
        content_depth: int = 4,
        mixer: MixerSpec = ATTENTION,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        if position_depth < 1 or content_depth < 1:
            raise UsageError(
                f"backbone.position_depth={position_depth} and backbone.content_depth={content_depth} must be at least 1"
            )
        if not num_grains:
            raise UsageError("backbone.type=dq needs a tokenizer whose ids vary in density: dqvae")
        sequence = GrainSequence(tuple(grid), num_grains)
        self.content = nn.Embedding(codebook_size + 1, dim)  # the last row: an end has no content
        self.position = nn.Embedding(sequence.num_positions, dim)
        self.segment = nn.Embedding(num_grains + 1, dim)
        self.label = LabelEmbedding(num_classes=num_classes, dim=dim)
        self.drop = Dropout(dropout)
        shape: dict[str, Any] = {"dim": dim, "mlp_ratio": mlp_ratio, "dropout": dropout}
        self.position_blocks = causal_blocks(mixer, 0, position_depth, **shape)
        self.content_blocks = causal_blocks(mixer, position_depth, content_depth, **shape)
        self.position_norm, self.content_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.position_head = nn.Linear(dim, sequence.num_positions)
        self.content_head = nn.Linear(dim, codebook_size)
        self.apply(init_normal)
        for head in (self.position_head, self.content_head):
            nn.init.zeros_(head.weight)
        self.place = nn.Embedding(sequence.length, dim)
        nn.init.zeros_(self.place.weight)  # as published

    def forward(
        self,
        x: tuple[Tensor, Tensor, Tensor],
        t: Tensor | None,
        cond: Cond,
        layout: Layout,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            x: positions and contents [B, n] of the pairs, and the grain [B, n] that is being coded when each is drawn; -1 for what does not exist.
            t: not used.
            cond: "label" [B] int64, -1 = null class.
            layout: not used.
            cache: not used; see the two halves below.

        Returns: logits of positions [B, n, P] and of contents [B, n, S].
        """
        positions, contents, grain = x
        hidden = self.contexts(positions[:, :-1], contents[:, :-1], grain, cond)
        return self.position_logits(hidden), self.content_logits(hidden, positions)

    def contexts(
        self, positions: Tensor, contents: Tensor, grain: Tensor, cond: Cond, cache: Cache | None = None
    ) -> Tensor:
        """What is known before each pair, [B, n, D].

        Args:
            positions, contents: of the pairs before the last of those n, and with a cache that has come before, behind those of earlier calls.
            grain: [B, n], what is being coded at each.
        """
        before = 0 if cache is None else cache.get("seen", 0)
        none = self.content.num_embeddings - 1
        h = self.position(positions.clamp_min(0)) + self.content(torch.where(contents < 0, none, contents))
        if before == 0:
            h = torch.cat([self.label(cond, len(h)).unsqueeze(1), h], dim=1)
        n = h.shape[1]
        h = self.drop(h + self.place.weight[before : before + n] + self.segment(grain))
        if cache is not None:
            cache["seen"] = before + n
        for block in self.position_blocks:
            h = block(h, _layout(n, h), cache)
        return h

    def position_logits(self, hidden: Tensor) -> Tensor:
        """Contexts [..., D] -> [..., P]."""
        return self.position_head(self.position_norm(hidden))

    def content_logits(self, hidden: Tensor, positions: Tensor, cache: Cache | None = None) -> Tensor:
        """Contexts [B, n, D] and the positions [B, n] of the same pairs -> [B, n, S]."""
        h = hidden + self.position(positions.clamp_min(0))
        for block in self.content_blocks:
            h = block(h, _layout(h.shape[1], h), cache)
        return self.content_head(self.content_norm(h))


def _layout(length: int, like: Tensor) -> Layout:
    """Of tokens that have no place on a grid: positions are embedded."""
    return Layout(coords=torch.zeros(1, length, 1, device=like.device), grid=None)
