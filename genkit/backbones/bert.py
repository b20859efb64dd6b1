"""BERT over partly masked ids, the class a token in front of them (Chang et al., "MaskGIT", CVPR 2022).

With one vocabulary of ids, mask and classes there, here with a table for each; and, as in bytedance/1d-tokenizer modeling/maskgit.py (ImageBert), with
a null class for guidance.
"""

from __future__ import annotations

from typing import Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from genkit.errors import UsageError
from genkit.interfaces import Cache, Cond, Layout
from genkit.nn.bidirectional import Block, init_normal
from genkit.nn.context import context_of
from genkit.nn.id_sequence import Head, IdHead, IdSequence, at_positions, on_grid, without_condition


class Bert(ModelMixin, ConfigMixin):
    """ids [B, Q, *grid] with the mask id S where unknown -> logits [B, Q, *grid, S].

    Args:
        codebook_size, num_levels: S, Q.
        num_classes: classes that cond["label"] counts; 0 = unconditional.
        grid: tokens per axis; no other fits.
        dim, depth, num_heads: of MaskGIT 768, 24 and 16.
        head: "tied" as MaskGIT; "linear" as ImageBert.
        gelu: "tanh" as MaskGIT's, "none" the exact one as ImageBert's.
        eps: of all layer norms.
        dropout: of the embeddings and on both residual branches.
    """

    _supports_gradient_checkpointing = True
    answers = "masked ids"

    @register_to_config
    def __init__(
        self,
        *,
        codebook_size: int,
        num_levels: int,
        num_classes: int,
        grid: tuple[int, ...],
        dim: int = 192,
        depth: int = 6,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        head: Head = "tied",
        gelu: Literal["none", "tanh"] = "none",
        eps: float = 1e-12,
        dropout: float = 0.1,
    ):
        super().__init__()
        if depth < 1:
            raise UsageError(f"backbone.depth={depth} must be at least 1")
        self.gradient_checkpointing = False
        self.sequence = IdSequence(
            codebook_size=codebook_size,
            num_levels=num_levels,
            num_classes=num_classes,
            grid=tuple(grid),
            dim=dim,
            norm="shared",
            eps=eps,
            dropout=dropout,
        )
        self.blocks = nn.ModuleList(
            Block(
                dim=dim,
                layer=i,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                norm="post",
                eps=eps,
                gelu=gelu,
                dropout=dropout,
            )
            for i in range(depth)
        )
        self.to_logits = IdHead(
            kind=head, dim=dim, embed_dim=dim, num_levels=num_levels, codebook_size=codebook_size, eps=eps, gelu=gelu
        )
        init_normal(self)

    def forward(
        self,
        x: Tensor,
        t: Tensor | None,
        cond: Cond,
        layout: Layout,
        cache: Cache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """As genkit.backbones.masked.Masked.forward; a cache with a context makes full and light passes of it (genkit/nn/context.py)."""
        context = context_of(cache)
        h = self.sequence(x, cond, layout, context)  # [B, 1 + N, D]
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                h = self._gradient_checkpointing_func(block, h, None, context)
            else:
                h = block(h, None, context)
        h = at_positions(without_condition(h, 1, context), positions)
        logits = self.to_logits(h, self.sequence.embed)
        return logits if positions is not None else on_grid(logits, x.shape)
