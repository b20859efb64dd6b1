"""An encoder that is spared half of the tokens, a decoder that guesses them: masked generation and representation in one network.

Li et al., "MAGE: Masked Generative Encoder to Unify Representation Learning and Image Synthesis", CVPR 2023; behaviour as in LTH14/mage models_mage.py,
without its contrastive variant. Difference: the class token may stand for a class, where the paper has none.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from genkit.errors import UsageError
from genkit.interfaces import Cache, Cond, Layout
from genkit.nn.adaln import init_linears
from genkit.nn.bidirectional import Block
from genkit.nn.context import Context, context_of, rows_of
from genkit.nn.id_sequence import Head, IdHead, IdSequence, at_positions, on_grid, without_condition


class MAGE(ModelMixin, ConfigMixin):
    """ids [B, Q, *grid] with the mask id S where unknown -> logits [B, Q, *grid, S].

    The decoder is given the encoded tokens, and at masked places the encoded class token.

    Args:
        codebook_size, num_levels: S, Q.
        num_classes: classes that cond["label"] counts; 0 = unconditional, as in the paper.
        grid: tokens per axis; no other fits.
        dim, depth, num_heads: of the encoder; of MAGE-B 768, 12, 12, L 1024, 24, 16.
        decoder_dim, decoder_depth, decoder_heads: of MAGE-B 768, 8, 16, L 1024, 8, 16; null = dim, and as many heads as the encoder's.
        dropout: of the embeddings and on residual branches.
        head: "tied_detached" as published; "tied" teaches the vectors of the ids, too, without which narrow networks learn several times more slowly.
        position_std: of the decoder's learned positions at the start. Masked places are told apart by these alone, added to a class token whose numbers
            are about 1: from the published 0.02 a short training first has to make them as large.
    """

    _supports_gradient_checkpointing = True
    answers = "masked ids"
    drops_tokens = True  # the objective may say which tokens the encoder is not given

    @register_to_config
    def __init__(
        self,
        *,
        codebook_size: int,
        num_levels: int,
        num_classes: int,
        grid: tuple[int, ...],
        dim: int = 192,
        depth: int = 4,
        num_heads: int = 4,
        decoder_dim: int | None = None,
        decoder_depth: int = 2,
        decoder_heads: int | None = None,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        head: Head = "tied_detached",
        position_std: float = 0.02,
    ):
        super().__init__()
        if depth < 1 or decoder_depth < 1:
            raise UsageError(f"backbone.depth={depth} and backbone.decoder_depth={decoder_depth} must be at least 1")
        if position_std <= 0:
            raise UsageError(f"backbone.position_std={position_std} must be positive")
        out_dim = decoder_dim or dim
        self.gradient_checkpointing = False
        self.sequence = IdSequence(
            codebook_size=codebook_size,
            num_levels=num_levels,
            num_classes=num_classes,
            grid=tuple(grid),
            dim=dim,
            norm="shared",
            eps=1e-6,
            dropout=dropout,
        )

        def blocks(dim: int, first: int, depth: int, num_heads: int) -> nn.ModuleList:
            return nn.ModuleList(
                Block(dim=dim, layer=first + i, num_heads=num_heads, mlp_ratio=mlp_ratio, dropout=dropout)
                for i in range(depth)
            )

        self.encoder = blocks(dim, 0, depth, num_heads)
        self.encoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.project = nn.Linear(dim, out_dim)
        self.decoder_positions = nn.Parameter(position_std * torch.randn(len(self.sequence.positions), out_dim))
        self.decoder = blocks(out_dim, depth, decoder_depth, decoder_heads or num_heads)
        self.decoder_norm = nn.LayerNorm(out_dim, eps=1e-6)
        self.to_logits = IdHead(
            kind=head,
            dim=out_dim,
            embed_dim=dim,
            num_levels=num_levels,
            codebook_size=codebook_size,
            eps=1e-5,
        )
        for part in (self.encoder, self.project, self.decoder, self.to_logits):
            init_linears(part)

    def forward(
        self,
        x: Tensor,
        t: Tensor | None,
        cond: Cond,
        layout: Layout,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> Tensor:
        """As genkit.backbones.masked.Masked.forward; a cache with a context makes full and light passes of it (genkit/nn/context.py).

        Args:
            dropped: [B, N] bool, masked tokens that the encoder is not given, as many of each sample.
        """
        context = context_of(cache)
        mask_id = self.sequence.embed.num_rows - 1
        is_masked = (x == mask_id).flatten(2).any(1)  # [B, n]
        h = self.sequence(x, cond, layout, context)  # [B, 1 + n, D]
        kept = None
        if dropped is not None:
            num_kept = int((~dropped[0]).sum())
            kept = dropped.to(torch.uint8).argsort(dim=1, stable=True)[:, :num_kept]  # row-major
            h = torch.cat([h[:, :1], rows_of(h[:, 1:], kept)], dim=1)
        for block in self.encoder:
            h = self._call(block, h, context)
        h = self.decoder_input(self.project(self.encoder_norm(h)), is_masked, kept, context)
        for block in self.decoder:
            h = self._call(block, h, context)
        h = at_positions(without_condition(self.decoder_norm(h), 1, context), positions)
        logits = self.to_logits(h, self.sequence.embed)
        return logits if positions is not None else on_grid(logits, x.shape)

    def decoder_input(self, encoded: Tensor, is_masked: Tensor, kept: Tensor | None, context: Context | None) -> Tensor:
        """encoded [B, 1 + m, D] -> [B, 1 + n, D]: masked places have the encoded class token, all have positions."""
        tokens = without_condition(encoded, 1, context)
        label = encoded[:, :1]
        if context is not None:  # a light pass that computes no class token has that of the full pass
            of_full = context.table("class token", lambda: encoded[:, :1])
            label = label if context.has_condition else of_full
        if kept is not None:
            at = kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
            tokens = label.expand(-1, is_masked.shape[1], -1).scatter(1, at, tokens)
        tokens = torch.where(is_masked.unsqueeze(-1), label, tokens)
        before, places = self.decoder_positions[:1], self.decoder_positions[1:]
        if context is not None:
            B = len(encoded)
            context.enter(1, len(places), B)
            if context.is_light:
                places = places[context.of(B)]
            if not context.has_condition:
                return tokens + places
        return torch.cat([label + before, tokens + places], dim=1)

    def _call(self, block: nn.Module, h: Tensor, context: Context | None) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, h, None, context)
        return block(h, None, context)
