"""An encoder that sees only the known tokens, a decoder that fills in the others, and a perceptron that draws each of them.

Li et al., "Autoregressive Image Generation without Vector Quantization" (MAR), NeurIPS 2024; behaviour as in LTH14/mar models/mar.py. Differences: samples
of a batch may have different numbers of known tokens; dropout works on residual branches, not on attention weights.
"""

from __future__ import annotations

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from genkit.errors import UsageError
from genkit.interfaces import Cache, Cond, Layout
from genkit.nn.adaln import init_linears
from genkit.nn.bidirectional import Block
from genkit.nn.context import Context, context_of, rows_of
from genkit.nn.embed import LabelEmbedding
from genkit.nn.patch import PatchSize, patch_sides, token_grid
from genkit.nn.token_head import TokenHead


class MAR(ModelMixin, ConfigMixin):
    """Tokens [B, N, W] of which some are known, label -> what is to be known of each, [B, N, D]; and `head`, which draws tokens from that.

    Tokens are patches of latents [B, C, *grid], W = C prod(patch), row-major (genkit/nn/patch.py).

    Args:
        channels: C.
        num_classes: classes that cond["label"] counts; 0 = unconditional.
        grid: cells per axis; no other fits.
        dim, depth, num_heads: of the encoder; of MAR-B 768, 12, 12, L 1024, 16, 16, H 1280, 20, 16.
        decoder_dim, decoder_depth, decoder_heads: null = as the encoder's.
        patch_size: cells per axis of a token: one number, or one per axis.
        buffer_size: tokens in front of the others that all are the class: room for the encoder to think in while little is known.
        head_width, head_depth: of the perceptron.
        norm_eps: of the norms of both halves.
        dropout: on the residual branches.

    Raises: UsageError for sizes that do not fit each other.
    """

    _supports_gradient_checkpointing = True
    answers = "continuous tokens"

    @register_to_config
    def __init__(
        self,
        *,
        channels: int,
        num_classes: int,
        grid: tuple[int, ...],
        dim: int = 192,
        depth: int = 4,
        num_heads: int = 4,
        decoder_dim: int | None = None,
        decoder_depth: int | None = None,
        decoder_heads: int | None = None,
        mlp_ratio: float = 4.0,
        patch_size: PatchSize = 1,
        buffer_size: int = 64,
        head_width: int = 512,
        head_depth: int = 3,
        norm_eps: float = 1e-6,
        dropout: float = 0.1,
    ):
        super().__init__()
        out_dim, out_depth = decoder_dim or dim, decoder_depth or depth
        if depth < 1 or buffer_size < 1:
            raise UsageError(f"backbone.depth={depth} and backbone.buffer_size={buffer_size} must be at least 1")
        self.gradient_checkpointing = False
        self.sides = patch_sides(patch_size, len(grid))
        self.token_grid = token_grid(tuple(grid), self.sides)
        self.num_tokens, self.num_before = math.prod(self.token_grid), buffer_size
        width = channels * math.prod(self.sides)

        def blocks(dim: int, first: int, depth: int, num_heads: int) -> nn.ModuleList:
            return nn.ModuleList(
                Block(dim=dim, layer=first + i, num_heads=num_heads, mlp_ratio=mlp_ratio, eps=norm_eps, dropout=dropout)
                for i in range(depth)
            )

        self.label = LabelEmbedding(num_classes=num_classes, dim=dim)
        self.embed = nn.Linear(width, dim)
        self.positions = nn.Parameter(torch.empty(buffer_size + self.num_tokens, dim))
        self.embed_norm = nn.LayerNorm(dim, eps=1e-6)
        self.encoder = blocks(dim, 0, depth, num_heads)
        self.encoder_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.project = nn.Linear(dim, out_dim)
        self.mask_token = nn.Parameter(torch.empty(out_dim))
        self.decoder_positions = nn.Parameter(torch.empty(buffer_size + self.num_tokens, out_dim))
        self.decoder = blocks(out_dim, depth, out_depth, decoder_heads or num_heads)
        self.decoder_norm = nn.LayerNorm(out_dim, eps=norm_eps)
        self.head_positions = nn.Parameter(torch.empty(self.num_tokens, out_dim))
        for part in (self.embed, self.encoder, self.project, self.decoder):
            init_linears(part)
        for table in (
            self.label.table.weight,
            self.positions,
            self.mask_token,
            self.decoder_positions,
            self.head_positions,
        ):
            nn.init.normal_(table, std=0.02)
        self.head = TokenHead(channels=width, condition_dim=out_dim, width=head_width, depth=head_depth)

    def forward(
        self,
        x: Tensor,
        t: Tensor | None,
        cond: Cond,
        layout: Layout,
        cache: Cache | None = None,
        known: Tensor | None = None,
        positions: Tensor | None = None,
        noisy: Tensor | None = None,
    ) -> Tensor:
        """What the head is told of every token, or what it says.

        Args:
            x: tokens [B, N, W]; what stands where they are not known is ignored. In a light pass the chosen ones alone (genkit/nn/context.py).
            t: of noisy tokens, [R, P].
            cond: "label" [B] int64, -1 = null class.
            layout: not read: positions are learned.
            known: [B, N] bool; None = all.
            positions: [P] int64, numbers of tokens in the flattened batch, where the head is called.
            noisy: [R, P, W]: R noisy versions of these tokens.

        Returns: [B, N, D], or of noisy tokens [R, P, 2 W].
        """
        known = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if known is None else known
        context = context_of(cache)
        encoded, slots = self.encode(x, known, cond, context)
        found = self.decode(encoded, slots, x.shape[1], context)
        if noisy is None or positions is None or t is None:
            return found
        told = found.flatten(0, 1).index_select(0, positions)  # [P, D]
        return self.head(noisy, t, told.expand(len(noisy), -1, -1))

    def encode(self, x: Tensor, known: Tensor, cond: Cond, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """(the condition's and the known tokens, encoded [B, E + m, D] (E = 0 where a light pass keeps the condition); slots [B, m] int64, which of the
        n tokens x each is, n where a sample has fewer)."""
        B, n, _ = x.shape
        if context is not None and (used := context.used_of(B)) is not None and context.is_light:
            known = known & used
        counts = known.sum(1)  # [B]
        m = int(counts.max())
        is_ragged = bool((counts != m).any())
        order = (~known).to(torch.uint8).argsort(dim=1, stable=True)[:, :m]  # the known ones, row-major
        slots = torch.where(torch.arange(m, device=x.device) < counts[:, None], order, n) if is_ragged else order
        if context is not None and context.is_light:
            places = context.of(B).gather(1, order)
        else:
            self._check(n)
            places = order
        tokens = self.embed_norm(self.embed(rows_of(x, order)) + self.positions[self.num_before + places])
        has_condition = context is None or context.has_condition
        if has_condition:
            label = self.label(cond, B).unsqueeze(1) + self.positions[: self.num_before]  # [B, E, D]
            tokens = torch.cat([self.embed_norm(label), tokens], dim=1)
        valid = None
        if is_ragged:
            valid = torch.arange(-self.num_before if has_condition else 0, m, device=x.device) < counts[:, None]
        if context is not None:
            valid = self._place(valid, m, B, context)
        for block in self.encoder:
            tokens = self._call(block, tokens, valid, context)
        return self.encoder_norm(tokens), slots

    def _place(self, valid: Tensor | None, m: int, batch_size: int, context: Context) -> Tensor | None:
        """Tells the context where the encoder's tokens lie, those of a light pass behind those of the full pass. Returns valid [B, E + m] of a full pass."""
        first, before = context.table("encoder", lambda: (self.num_before + m, valid))
        if not context.is_light:
            context.place(None, valid)
            return valid
        device = self.positions.device
        rows = torch.arange(first, first + m, device=device)
        if context.has_condition:
            rows = torch.cat([torch.arange(self.num_before, device=device), rows])
        keys = None
        if before is not None or valid is not None:
            every = torch.ones(batch_size, 1, dtype=torch.bool, device=device)
            old = every.expand(-1, first) if before is None else before
            keys = torch.cat([old, every.expand(-1, m) if valid is None else valid[:, valid.shape[1] - m :]], dim=1)
        context.place(rows.expand(batch_size, -1), keys, first + m)
        return None

    def decode(self, encoded: Tensor, slots: Tensor, n: int, context: Context | None = None) -> Tensor:
        """encoded [B, E + m, D] -> what is to be known of each of the n tokens, [B, n, D]."""
        B = len(encoded)
        h = self.project(encoded)
        E = h.shape[1] - slots.shape[1]  # 0 where a light pass keeps the condition
        tokens = self.mask_token.to(h.dtype).expand(B, n + 1, -1)  # the last takes what lies in spare slots
        tokens = tokens.scatter(1, slots[..., None].expand(-1, -1, h.shape[-1]), h[:, E:])[:, :n]
        before, places = self.decoder_positions[:E], self.decoder_positions[self.num_before :]
        ends: Tensor = self.head_positions
        if context is not None:
            context.enter(self.num_before, self.num_tokens, B)
            if context.is_light:
                places, ends = places[context.of(B)], ends[context.of(B)]
        h = torch.cat([h[:, :E] + before, tokens + places], dim=1)
        for block in self.decoder:
            h = self._call(block, h, None, context)
        return self.decoder_norm(h[:, E:]) + ends

    def _call(self, block: nn.Module, h: Tensor, valid: Tensor | None, context: Context | None) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, h, valid, context)
        return block(h, valid, context)

    def _check(self, n: int) -> None:
        if n != self.num_tokens:
            raise UsageError(
                f"the learned positions are for {self.num_tokens} tokens ({self.token_grid}), found {n}; use latents of that size"
            )
