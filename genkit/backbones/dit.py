"""Transformer over patches, conditioned by adaLN-Zero (Peebles and Xie, "DiT", ICCV 2023; the same network in Ma et al., "SiT", ECCV 2024).

Differences from the paper: grids of any size and number of axes; attention may be replaced by any mixer. Noise schedules, objectives and guidance
live elsewhere: the network is fed the t that its objective gives it (DiT 0 .. 999, SiT [0, 1]).

How x becomes tokens and what is read of the layout: genkit/nn/patch.py.
"""

from __future__ import annotations

from typing import Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from genkit.errors import UsageError
from genkit.interfaces import BLOCKS, Cache, Cond, Layout
from genkit.mixers.attention import Attention
from genkit.nn.adaln import AdaLNBlock, AdaLNHead, init_linears
from genkit.nn.condition import Condition
from genkit.nn.grid_positions import GridPositions
from genkit.nn.mlp import MLP
from genkit.nn.patch import PatchSize, patch_sides, patchify, real_only, token_grid, token_layout, unpatchify
from genkit.nn.through import through
from genkit.nn.told import Told
from genkit.registry import MixerSpec, maker

ATTENTION: MixerSpec = {"type": "attention", "num_heads": 6, "qk_norm": False, "rope": False}


class DiT(ModelMixin, ConfigMixin):
    """x [B, C, *grid], t, label -> [B, C or 2 C, *grid]. A fresh network returns 0.

    Args:
        channels: C.
        num_classes: classes that cond["label"] counts; 0 = unconditional.
        grid: cells per axis while training; any other may follow.
        dim, depth: of the paper's sizes, S 384 and 12, B 768 and 12, L 1024 and 24, XL 1152 and 28, with 6, 12, 16 and 16 heads.
        patch_size: cells per axis of a token: one number, or one per axis.
        mixer: a part, or a list of parts repeated through the depth; attention without rotation or norms is the paper's.
        mlp_ratio: hidden channels of the perceptrons per channel.
        gelu: "tanh" as in DiT; "none", the exact one, is faster on a CPU.
        positions: "sincos" fixed waves; "table" trained vectors, stretched where the grid is another.
        beyond: how waves meet a grid of another size, see GridPositions.
        learn_sigma: two outputs per channel: the noise and what the variance is interpolated by.
        null_class: whether the table of classes has a row for "none".
        time_scale: what t is multiplied by before it becomes waves; 1 in all that was published, also where t is in [0, 1].
        freq_shift, mlp_norm_eps: 0 and 1e-6 in DiT and SiT; 1 and 1e-5 in diffusers' DiTTransformer2DModel. Set from where weights come from.
        own_conditions: embeddings of time and class for every block, the first block's for the head too: how diffusers keeps them.
        dropout: on both residual branches.
        context_dim, text_length: what every block attends to besides, see genkit.nn.told; the section `condition` of a recipe sets them.

    Raises: UsageError for sizes that do not fit each other.
    """

    _supports_gradient_checkpointing = True
    answers = "noisy latents"
    heeds = (BLOCKS,)

    @register_to_config
    def __init__(
        self,
        *,
        channels: int,
        num_classes: int,
        grid: tuple[int, ...],
        dim: int = 384,
        depth: int = 12,
        patch_size: PatchSize = 2,
        mixer: MixerSpec = ATTENTION,
        mlp_ratio: float = 4.0,
        gelu: Literal["tanh", "none"] = "tanh",
        positions: Literal["sincos", "table"] = "sincos",
        beyond: Literal["stretch", "continue"] = "stretch",
        learn_sigma: bool = False,
        null_class: bool = True,
        time_scale: float = 1.0,
        freq_shift: int = 0,
        mlp_norm_eps: float = 1e-6,
        own_conditions: bool = False,
        dropout: float = 0.0,
        context_dim: int | None = None,
        text_length: int | None = None,
    ):
        super().__init__()
        if depth < 1:
            raise UsageError(f"backbone.depth={depth} must be at least 1")
        make_mixer = maker("mixer", mixer)
        self.gradient_checkpointing = False
        self.out_channels = (2 if learn_sigma else 1) * channels
        self.sides = patch_sides(patch_size, len(grid))
        cells = torch.Size(self.sides).numel()
        self.embed = nn.Linear(channels * cells, dim)
        self.position = GridPositions(grid=token_grid(tuple(grid), self.sides), dim=dim, kind=positions, beyond=beyond)
        self.conditions = nn.ModuleList(
            Condition(
                num_classes=num_classes, dim=dim, time_scale=time_scale, freq_shift=freq_shift, null_class=null_class
            )
            for _ in range(depth if own_conditions else 1)
        )
        self.told = Told(dim=dim, context_dim=context_dim, text_length=text_length)
        self.blocks = nn.ModuleList(
            AdaLNBlock(
                dim=dim,
                mixer=make_mixer(dim=dim, layer=i),
                mlp=MLP(dim=dim, mlp_ratio=mlp_ratio, approximate=gelu),
                dropout=dropout,
                mlp_norm_eps=mlp_norm_eps,
                cross=self.told.attention(),
            )
            for i in range(depth)
        )
        self.head = AdaLNHead(dim=dim, width=self.out_channels * cells)
        self.initialise()

    def initialise(self) -> None:
        """As published. A mixer other than attention keeps what it was made with."""
        init_linears(self.embed)
        for block in self.blocks:
            assert isinstance(block, AdaLNBlock)
            block.initialise()
            if isinstance(block.mixer, Attention):
                init_linears(block.mixer)

    def forward(self, x: Tensor, t: Tensor | None, cond: Cond, layout: Layout, cache: Cache | None = None) -> Tensor:
        """
        Args:
            x: [B, C, *grid].
            t: a number, one per sample [B], or None where time means nothing.
            cond: "label" [B] int64, -1 = null class; "context" or "text", see genkit.nn.told.
            layout: its `valid` [B, cells of x] says which cells are real; nothing else of it is read.
            cache: handed to the mixers; may skip blocks (see nn.through).

        Returns: [B, out_channels, *grid], 0 at padding.
        Raises: UsageError for a grid that patches do not fill.
        """
        B = x.shape[0]
        tokens = token_layout(x, layout, self.sides)
        assert tokens.grid is not None
        h = self.embed(patchify(x, self.sides))  # [B, N, D]
        h = h + self.position(tokens.grid, x.device).to(h.dtype)
        conditions = [condition(t, cond, B) for condition in self.conditions]  # [B, D] each
        told = self.told(cond)

        def run(i: int, h: Tensor) -> Tensor:
            c = conditions[i % len(conditions)]
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                return self._gradient_checkpointing_func(self.blocks[i], h, c, tokens, cache, None, None, told)
            return self.blocks[i](h, c, tokens, cache, context=told)

        h = through(len(self.blocks), h, run, cache)
        return unpatchify(real_only(self.head(h, conditions[0]), tokens), tokens.grid, self.sides)
