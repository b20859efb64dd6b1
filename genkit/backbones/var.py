"""Transformer that draws an image scale after scale (Tian et al., "Visual Autoregressive Modeling", VAR, NeurIPS 2024).

The same network draws frequency band after frequency band on ids of the tokenizer `nfig` (Huang et al., "NFIG", 2025). Differences from VAR: what a
scale is shown - the sum of the scales before it, shrunk to it - is made by the objective, from the tokenizer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.init import trunc_normal_, zeros_

from genkit.errors import UsageError
from genkit.interfaces import Cache, Cond, Layout
from genkit.nn.adaln import AdaLNBlock, AdaLNHead
from genkit.nn.embed import LabelEmbedding
from genkit.nn.mlp import MLP
from genkit.registry import MixerSpec, maker

ATTENTION: MixerSpec = {"type": "scale_attention", "num_heads": 4}


class Table(nn.Module):
    """In place of what depends on the condition: six vectors that do not, [6 D], for a part that all blocks share is added to them."""

    def __init__(self, dim: int):
        super().__init__()
        self.table = nn.Parameter(torch.randn(6 * dim) / math.sqrt(dim))

    def forward(self, c: Tensor) -> Tensor:
        return self.table


class VAR(ModelMixin, ConfigMixin):
    """What the scales are shown [B, N - p_1^2, C] -> logits [B, N, S] of the ids of all scales, each given those of the scales before it.

    Args:
        channels: C, width of a code.
        codebook_size: S.
        num_classes: classes that cond["label"] counts; 0 = unconditional.
        patch_sizes: side of the grid of every scale, as of the tokenizer; N is the sum of their squares.
        dim, depth: of VAR-d16, -d20, -d24, -d30: 64 per layer, as many heads of 64 channels as layers.
        mixer: scale_attention, or a list of such parts repeated through the depth.
        mlp_ratio: hidden channels of the perceptrons per channel.
        shared_modulation: one map from the condition to shifts, scales and gates for all blocks, to which each adds vectors of its own (VAR-d36-s).
        dropout: on both residual branches.
        drop_path: probability of leaving out a branch in the last layer, rising from 0 in the first; the paper's is depth / 240.
        norm_eps: of the norms of blocks and head.
        gate: the gates begin small by this factor, the paper's alng: 1e-3 for d16 and d20, 1e-4 and 1e-5 for larger ones.

    Raises: UsageError for a tokenizer without scales.
    """

    _supports_gradient_checkpointing = True
    answers = "scales"
    undecayed = ("start", "position")  # as published

    @register_to_config
    def __init__(
        self,
        *,
        channels: int,
        codebook_size: int,
        num_classes: int,
        patch_sizes: tuple[int, ...] | None,
        dim: int = 256,
        depth: int = 4,
        mixer: MixerSpec = ATTENTION,
        mlp_ratio: float = 4.0,
        shared_modulation: bool = False,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        gate: float = 1e-3,
    ):
        super().__init__()
        if depth < 1:
            raise UsageError(f"backbone.depth={depth} must be at least 1")
        if not patch_sizes:
            raise UsageError(
                "backbone.type=var draws scale after scale and needs a tokenizer that codes so: var_vq or nfig"
            )
        make_mixer = maker("mixer", mixer)
        self.gradient_checkpointing = False
        areas = [p * p for p in patch_sizes]
        self.embed = nn.Linear(channels, dim)
        self.label = LabelEmbedding(num_classes=num_classes, dim=dim)
        self.start = nn.Parameter(torch.empty(areas[0], dim))
        self.position = nn.Parameter(torch.empty(sum(areas), dim))
        self.level = nn.Embedding(len(areas), dim)
        self.shared = nn.Linear(dim, 6 * dim) if shared_modulation else None
        self.blocks = nn.ModuleList(
            AdaLNBlock(
                dim=dim,
                mixer=make_mixer(dim=dim, layer=i),
                mlp=MLP(dim=dim, mlp_ratio=mlp_ratio, approximate="tanh"),
                dropout=dropout,
                drop_path=drop_path * i / max(1, depth - 1),
                modulation=Table(dim) if shared_modulation else None,
                norm_eps=norm_eps,
            )
            for i in range(depth)
        )
        self.head = AdaLNHead(dim=dim, width=codebook_size, norm_eps=norm_eps)
        self.coords: Tensor
        self.register_buffer("coords", scale_coords(patch_sizes), persistent=False)
        self.initialise(gate)

    def initialise(self, gate: float) -> None:
        """As the paper's code: truncated normal of variance 1 / (3 dim), what ends a branch divided by sqrt(2 depth), gates and head small."""
        dim, depth = self.config["dim"], self.config["depth"]
        std = math.sqrt(1 / dim / 3)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                zeros_(module.bias)
        trunc_normal_(self.start, std=std)
        trunc_normal_(self.position, std=std)
        with torch.no_grad():
            assert isinstance(self.head.modulation, nn.Linear)
            self.head.linear.weight.mul_(0.02)
            self.head.modulation.weight.mul_(0.5)
            for block in self.blocks:
                assert isinstance(block, AdaLNBlock)
                block.mlp.down.weight.div_(math.sqrt(2 * depth))  # type: ignore[operator, union-attr]
                if hasattr(block.mixer, "proj"):
                    block.mixer.proj.weight.div_(math.sqrt(2 * depth))  # type: ignore[operator, union-attr]
                of_vectors = next(block.modulation.parameters())  # the weight of a linear map, or the table
                vectors = of_vectors.view(6, dim, -1)
                vectors[0::3].mul_(0.5)
                vectors[1::3].mul_(0.5)
                vectors[2::3].mul_(gate)

    def forward(self, x: Tensor, t: Tensor | None, cond: Cond, layout: Layout, cache: Cache | None = None) -> Tensor:
        """
        Args:
            x: what the scales are shown, [B, n, C]: of all scales but the first, or of the first ones of them; with a cache, of the scales that
                follow those of earlier calls.
            t: not used.
            cond: "label" [B] int64, -1 = null class.
            layout: not used: scales have positions of their own.

        Returns: logits [B, n, S] of these scales, and where no cache says that it came before, of the first one in front.
        """
        B = x.shape[0] if cond.get("label") is None else cond["label"].shape[0]
        label = self.label(cond, B)  # [B, D]
        before = 0 if cache is None else cache.get("seen", 0)
        h = self.embed(x)
        if before == 0:
            h = torch.cat([label.unsqueeze(1) + self.start, h], dim=1)
        behind = before + h.shape[1]
        coords = self.coords[:, before:behind]
        h = h + self.position[before:behind] + self.level(coords[0, :, 0].long())
        if cache is not None:
            cache.setdefault("num_tokens", len(self.position))
            cache["seen"] = behind
        tokens = Layout(coords=coords, grid=None)
        c = nn.functional.silu(label)
        shared = None if self.shared is None else self.shared(c)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                h = self._gradient_checkpointing_func(block, h, c, tokens, cache, shared)
            else:
                h = block(h, c, tokens, cache, shared)
        return self.head(h, c)


def scale_coords(patch_sizes: tuple[int, ...]) -> Tensor:
    """[1, N, 3]: number of the scale, row and column of every token."""
    parts: list[Any] = []
    for number, p in enumerate(patch_sizes):
        rows, columns = torch.meshgrid(torch.arange(p), torch.arange(p), indexing="ij")
        parts.append(torch.stack([torch.full_like(rows, number), rows, columns], dim=-1).flatten(0, 1))
    return torch.cat(parts).float().unsqueeze(0)
