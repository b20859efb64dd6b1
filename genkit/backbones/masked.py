"""Bidirectional transformer over partly masked ids (Chang et al., "MaskGIT", CVPR 2022).

Differences from the paper: pre-norm blocks conditioned by adaLN-zero (Peebles and Xie, 2023; for masked generation
Besnier et al., "Halton Scheduler", ICLR 2025) in place of a class token in the sequence, so that every mixer sees a
clean grid; one embedding table and one output head per quantiser level in place of one vocabulary for ids and classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from genkit.errors import UsageError
from genkit.interfaces import ATTEND, Cache, Cond, Layout
from genkit.nn.context import TABLE, check_keeps_context, context_of
from genkit.nn.cross_attention import CrossAttention
from genkit.nn.dropout import Dropout
from genkit.nn.embed import IdEmbedding, LabelEmbedding, PositionEmbedding, SincosPositions
from genkit.nn.mlp import MLP
from genkit.nn.norm import modulate
from genkit.nn.told import Told
from genkit.registry import MixerSpec, maker

ATTENTION: MixerSpec = {"type": "attention"}


class Block(nn.Module):
    """Mixer and MLP, each inside a residual branch whose shift, scale and gate come from the condition c [B, D]; with a context, attention to it between
    them, as MUSE (Chang et al., 2023)."""

    def __init__(
        self, *, dim: int, mixer: nn.Module, mlp_ratio: float, dropout: float, cross: CrossAttention | None = None
    ):
        super().__init__()
        self.mixer = mixer
        self.mlp = MLP(dim=dim, mlp_ratio=mlp_ratio)
        self.dropout = Dropout(dropout)
        self.cross = cross
        self.cross_norm = None if cross is None else nn.LayerNorm(dim, eps=1e-6)
        self.modulation = nn.Linear(dim, 6 * dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)  # as DiT
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.modulation.weight)  # every block starts as the identity
        if cross is not None:
            nn.init.zeros_(cross.proj.weight)

    def forward(
        self,
        h: Tensor,
        c: Tensor,
        layout: Layout,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        context: tuple[Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        """[B, N, D] -> [B, N, D]. Where positions [P] are given, only these tokens of the flattened batch go on after
        mixing: -> [P, D].
        """
        B, N, D = h.shape
        vectors = (
            self.modulation(c)
            if cache is None or TABLE not in cache
            else cache[TABLE](self, lambda: self.modulation(c))
        )
        mixing, widening = vectors.view(B, 2, 3, D).unbind(1)  # [B, 3, D] each
        shift, scale, gate = mixing.unsqueeze(2).unbind(1)  # [B, 1, D] each
        h = torch.addcmul(h, gate, self.dropout(self.mixer(modulate(h, shift, scale), layout, cache)))
        if self.cross is not None and self.cross_norm is not None and context is not None:
            h = h + self.dropout(self.cross(self.cross_norm(h), *context))
        if positions is None:
            shift, scale, gate = widening.unsqueeze(2).unbind(1)
        else:
            h = h.flatten(0, 1).index_select(0, positions)  # [P, D]
            shift, scale, gate = widening.index_select(0, positions // N).unbind(1)  # [P, D] each
        return torch.addcmul(h, gate, self.dropout(self.mlp(modulate(h, shift, scale))))


class Masked(ModelMixin, ConfigMixin):
    """ids [B, Q, *grid] with the mask id S where unknown -> logits [B, Q, *grid, S].

    Args:
        codebook_size: S; the mask id is S.
        num_levels: Q.
        num_classes: classes that cond["label"] counts; 0 = unconditional.
        grid: tokens per axis while training.
        mixer: a part, or a list of parts repeated through the depth.
        dropout: on both residual branches.
        positions: "learned" one vector per place, fits only the trained grid; "sincos" fixed waves, fits any grid.
        context_dim, text_length: what every block attends to besides, see genkit.nn.told; the section `condition` of a recipe sets them.
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
        mixer: MixerSpec = ATTENTION,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        positions: Literal["learned", "sincos"] = "learned",
        context_dim: int | None = None,
        text_length: int | None = None,
    ):
        super().__init__()
        if depth < 1:
            raise UsageError(f"backbone.depth={depth} must be at least 1")
        make_mixer = maker("mixer", mixer)
        self.gradient_checkpointing = False
        self.embed = IdEmbedding(num_levels=num_levels, num_rows=codebook_size + 1, dim=dim)
        self.label = LabelEmbedding(num_classes=num_classes, dim=dim)
        Positions = PositionEmbedding if positions == "learned" else SincosPositions
        self.position = Positions(grid=tuple(grid), dim=dim)
        self.told = Told(dim=dim, context_dim=context_dim, text_length=text_length)
        self.blocks = nn.ModuleList(
            Block(
                dim=dim,
                mixer=make_mixer(dim=dim, layer=i),
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                cross=self.told.attention(),
            )
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_levels * codebook_size)
        nn.init.zeros_(self.head.weight)  # the first loss is exactly ln S
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        x: Tensor,
        t: Tensor | None,
        cond: Cond,
        layout: Layout,
        cache: Cache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Logits of every token, or of the chosen ones only.

        Args:
            x: ids [B, Q, *grid] int64 in 0 .. S, S = mask.
            t: not used; how much is masked is visible in x.
            cond: "label" [B] int64, -1 = null class.
            layout: coords of the N = prod(grid) tokens.
            cache: handed to the mixers; with a context, of a full pass or a light one over ids [B, Q, n] (genkit/nn/context.py).
            positions: [P] int64, numbers of tokens in the flattened batch [B * N]. The last MLP and the head then run
            on these alone.

        Returns: [B, Q, *grid, S], or [P, Q, S] where positions are given.
        Raises: UsageError when learned positions do not fit layout.grid, or for a context where tokens meet otherwise than by attention.
        """
        B, Q, *grid = x.shape
        if (context := context_of(cache)) is None:
            h = self.embed(x) + self.position(layout)  # [B, N, D]
        else:
            check_keeps_context(self.blocks)
            places = context.per_token("positions", lambda: self.position(layout), B)
            h = self.embed(x) + places
            context.enter(0, context.table("num_tokens", lambda: h.shape[1]), B)
            cache = {ATTEND: context.attend, TABLE: context.table}  # light passes are told the same
        c = nn.functional.silu(self.label(cond, B))  # [B, D]
        told = self.told(cond)
        for i, block in enumerate(self.blocks):
            chosen = positions if i == len(self.blocks) - 1 else None
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                h = self._gradient_checkpointing_func(block, h, c, layout, cache, chosen, told)
            else:
                h = block(h, c, layout, cache, chosen, told)
        logits = self.head(self.norm(h)).unflatten(-1, (Q, -1))  # [B, N, Q, S] or [P, Q, S]
        if positions is not None:
            return logits
        return logits.transpose(1, 2).unflatten(2, grid)
