"""U-ViT over partly masked ids (Bao et al., "All are Worth Words", CVPR 2023): skips join the first half of the blocks to the second.

The generator of AutoNAT (Ni et al., CVPR 2024), on which ReCAP (2025) reuses context, and of bytedance/1d-tokenizer modeling/maskgit.py (UViTBert).
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from genkit.errors import UsageError
from genkit.interfaces import Cache, Cond, Layout
from genkit.nn.bidirectional import Block, init_normal
from genkit.nn.context import Context, context_of
from genkit.nn.id_sequence import EmbedNorm, Head, IdHead, IdSequence, at_positions, on_grid, without_condition


class UViT(ModelMixin, ConfigMixin):
    """ids [B, Q, *grid] with the mask id S where unknown -> logits [B, Q, *grid, S].

    Args:
        codebook_size, num_levels: S, Q.
        num_classes: classes that cond["label"] counts; 0 = unconditional.
        grid: tokens per axis; no other fits.
        dim, depth, num_heads: depth is even; one block stands between the halves, or alone at depth 0. Of AutoNAT-L 768, 24 and 8.
        head: "tied_detached" as AutoNAT, "linear" as UViTBert. "tied" teaches the vectors of the ids, too: narrow networks learn several times faster with it.
        embed_norm: "own" as AutoNAT, "none" as UViTBert; see IdSequence.
        has_skips: AutoNAT and UViTBert have them; without, a plain pre-norm transformer.
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
        qkv_bias: bool = False,
        head: Head = "tied_detached",
        embed_norm: EmbedNorm = "own",
        has_skips: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        if depth < 0 or depth % 2:
            raise UsageError(
                f"backbone.depth={depth} must be even and not negative: each block of one half has a partner in the other"
            )
        self.gradient_checkpointing = False
        self.has_skips = has_skips
        self.sequence = IdSequence(
            codebook_size=codebook_size,
            num_levels=num_levels,
            num_classes=num_classes,
            grid=tuple(grid),
            dim=dim,
            norm=embed_norm,
            eps=1e-6,
            dropout=dropout,
        )
        self.blocks = nn.ModuleList(
            Block(
                dim=dim,
                layer=i,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                eps=1e-5,
                dropout=dropout,
                has_skip=has_skips and i > depth // 2,
            )
            for i in range(depth + 1)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.to_logits = IdHead(
            kind=head, dim=dim, embed_dim=dim, num_levels=num_levels, codebook_size=codebook_size, eps=1e-5
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
        h = self.trunk(self.sequence(x, cond, layout, context), context)
        h = self.norm(at_positions(without_condition(h, 1, context), positions))
        logits = self.to_logits(h, self.sequence.embed)
        return logits if positions is not None else on_grid(logits, x.shape)

    def trunk(self, h: Tensor, context: Context | None) -> Tensor:
        half = len(self.blocks) // 2
        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            skip = skips.pop() if i > half and self.has_skips else None
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                h = self._gradient_checkpointing_func(block, h, None, context, skip)
            else:
                h = block(h, None, context, skip)
            if i < half:
                skips.append(h)
        return h
