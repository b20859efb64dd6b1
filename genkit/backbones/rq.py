"""Two causal transformers for several ids per place: one over places, one over the depth of a place.

Lee et al., "Autoregressive Image Generation using Residual Quantization" (RQ-Transformer), CVPR 2022, section 3.2. Differences from the paper: ids are
embedded by tables that are learned here, not by the codes of the tokenizer; targets are the ids themselves, not a soft distribution over codes
(objective.label_smoothing is the nearest to it); classes can be dropped for guidance.
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
from genkit.nn.embed import LabelEmbedding, PositionEmbedding
from genkit.nn.layout import dense_layout
from genkit.nn.sequence import part
from genkit.registry import MixerSpec

ATTENTION: MixerSpec = {"type": "attention", "num_heads": 4, "qk_norm": False, "rope": False, "is_causal": True}


class RQ(ModelMixin, ConfigMixin):
    """ids [B, Q, *grid] -> logits [B, Q, *grid, S] of each id given all ids of the places before and those before it at its own place.

    Args:
        codebook_size: S.
        num_levels: Q.
        num_classes: classes that cond["label"] counts; 0 = unconditional.
        grid: places per axis.
        dim, depth, head_depth: of the paper's sizes 1536, 42 and 6 (1.4 B) with 24 heads; 12 and 4, 24 and 4 for 480 M and 821 M.
        code_dim: width of the tables of ids, 256 in the paper; None = dim.
        mixer: a causal part, or a list of parts repeated through the depth, for places.
        head_mixer: the same for the ids of one place.
        mlp_ratio: hidden channels of the perceptrons per channel.
        dropout: on the embedded ids and both residual branches.

    Raises: UsageError for a mixer that sees ahead.
    """

    answers = "next ids"

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
        head_depth: int = 2,
        code_dim: int | None = None,
        mixer: MixerSpec = ATTENTION,
        head_mixer: MixerSpec = ATTENTION,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        if depth < 1 or head_depth < 1:
            raise UsageError(f"backbone.depth={depth} and backbone.head_depth={head_depth} must be at least 1")
        code_dim = dim if code_dim is None else code_dim
        self.codes = nn.Embedding(num_levels * codebook_size, code_dim)
        self.first_row: Tensor
        self.register_buffer("first_row", codebook_size * torch.arange(num_levels), persistent=False)
        self.label = LabelEmbedding(num_classes=num_classes, dim=dim)
        self.body_in, self.head_in = nn.Linear(code_dim, dim), nn.Linear(code_dim, dim)
        self.level = nn.Embedding(num_levels, dim)
        self.drop = Dropout(dropout)

        shape: dict[str, Any] = {"dim": dim, "mlp_ratio": mlp_ratio, "dropout": dropout}
        self.body, self.head = (
            causal_blocks(mixer, 0, depth, **shape),
            causal_blocks(head_mixer, 0, head_depth, **shape),
        )
        self.norm = nn.LayerNorm(dim)
        self.classifier = nn.Linear(dim, codebook_size)
        self.apply(init_normal)
        nn.init.zeros_(self.classifier.weight)  # the first loss is exactly ln S
        self.position = PositionEmbedding(grid=tuple(grid), dim=dim)

    def forward(self, x: Tensor, t: Tensor | None, cond: Cond, layout: Layout, cache: Cache | None = None) -> Tensor:
        """Logits of every id in one pass.

        Args:
            x: ids [B, Q, *grid] int64.
            t: not used.
            cond: "label" [B] int64, -1 = null class.
            layout: coords of the N = prod(grid) places.
            cache: not used; see next_logits.

        Returns: [B, Q, *grid, S].
        """
        B, Q, *grid = x.shape
        codes = self._codes(x.flatten(2).transpose(1, 2).flatten(1))  # [B, N, Q, D]
        u = self._run_body(codes[:, :-1].sum(2), cond, layout, 0, None)  # [B, N, D]
        inside = self.head_in(codes[:, :, :-1].cumsum(2))
        h = self.drop(torch.cat([u.unsqueeze(2), inside], dim=2) + self.level.weight).flatten(0, 1)  # [B N, Q, D]
        depths = dense_layout((Q,), device=x.device)
        for block in self.head:
            h = block(h, depths)
        logits = self.classifier(self.norm(h))
        return logits.unflatten(0, (B, -1)).transpose(1, 2).unflatten(2, grid)

    def next_logits(self, ids: Tensor, cond: Cond, layout: Layout, cache: Cache | None = None, last: int = 1) -> Tensor:
        """Logits of the id that follows those given, depth first: ids [B, m] -> [B, 1, S]. `last` other than 1 is for backbones with one id per place.

        With a cache only what came since earlier calls is computed.
        """
        if last != 1:
            raise UsageError(
                "backbone.type=rq draws ids one by one; parallel decoding needs a generator with one id per place"
            )
        Q = self.config["num_levels"]
        place, depth = divmod(ids.shape[1], Q)
        body: Cache = {} if cache is None else cache.setdefault("body", {"num_tokens": layout.coords.shape[1]})
        before = body.get("seen", 0)  # places whose context is known
        if place >= before:
            whole = self._codes(ids[:, max(0, before - 1) * Q : place * Q]).sum(2)  # [B, places, D]
            u = self._run_body(whole, cond, layout, before, None if cache is None else body)[:, -1:]
            body["seen"], body["u"], body["head"] = place + 1, u, {"num_tokens": Q}
        head: Cache | None = None if cache is None else body["head"]
        first = 0 if head is None else head.get("seen", 0)
        h = body["u"]
        if depth:
            inside = self._codes(ids[:, place * Q :]).squeeze(1).cumsum(1)  # [B, depth, D]
            h = torch.cat([h, self.head_in(inside)], dim=1)
        h = (h + self.level.weight[: depth + 1])[:, first:]
        depths = part(dense_layout((Q,), device=ids.device), first, depth + 1)
        for block in self.head:
            h = block(h, depths, head)
        if head is not None:
            head["seen"] = depth + 1
        return self.classifier(self.norm(h[:, -1:]))

    def step_counts(self, grid: tuple[int, ...]) -> list[int]:
        """How many ids each step of sampling draws."""
        return [1] * (torch.Size(grid).numel() * self.config["num_levels"])

    def _codes(self, ids: Tensor) -> Tensor:
        """ids [B, m], depth first -> [B, places, Q, D]; an unfinished place alone has the levels it has."""
        levels = min(self.config["num_levels"], ids.shape[1]) or self.config["num_levels"]
        return self.codes(ids.unflatten(1, (-1, levels)) + self.first_row[:levels])

    def _run_body(self, codes: Tensor, cond: Cond, layout: Layout, before: int, cache: Cache | None) -> Tensor:
        """Contexts of the places from `before` on, [B, n, D], given the sums of codes of the places before each: all but the first's."""
        h = self.body_in(codes)
        if before == 0:
            h = torch.cat([self.label(cond, codes.shape[0]).unsqueeze(1), h], dim=1)
        here = slice(before, before + h.shape[1])
        h = self.drop(h + self.position(layout)[:, here])
        places = part(layout, here.start, here.stop)
        for block in self.body:
            h = block(h, places, cache)
        return h
