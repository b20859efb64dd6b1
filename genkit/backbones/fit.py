"""Transformer over tokens at their places in images of any size (Lu et al., "FiT", ICML 2024; Wang et al., "FiTv2", 2024).

Differences from the papers: other mixers may stand in for attention; grids of any number of axes. Time and objective as the caller has them (FiT 0 .. 999
of a diffusion, FiTv2 [0, 1] of a flow towards data).

Where samples of a batch have sizes of their own (`layout.valid`), only real tokens are computed: they are packed into [M, D], and attention alone sees
them as samples, in groups of about one length (genkit/nn/packing.py). Padding is never seen and comes out as 0. How x becomes tokens and what is read of the layout:
genkit/nn/patch.py; a layout without a grid says that x already is tokens (see FiT.forward).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from genkit.errors import UsageError
from genkit.interfaces import ATTEND, BLOCKS, Cache, Cond, Layout
from genkit.nn.adaln import AdaLNBlock, AdaLNHead, init_linears, init_zero
from genkit.nn.attend import attend
from genkit.nn.condition import Condition
from genkit.nn.extrapolation import Extrapolation, Gain, Method, turning_table
from genkit.nn.gated_mlp import GatedMLP
from genkit.nn.layout import dense_layout
from genkit.nn.mlp import MLP
from genkit.nn.norm import Norm, make_norm
from genkit.nn.packing import SLACK, Packing
from genkit.nn.patch import PatchSize, patch_sides, patchify, real_only, token_grid, token_layout, unpatchify
from genkit.nn.rope import rotate
from genkit.nn.through import through
from genkit.registry import MixerSpec, maker


@dataclass(frozen=True)
class TurnedLayout(Layout):
    """A layout whose rotations are computed once for all blocks."""

    table: tuple[Tensor, Tensor] | None = (
        None  # cos and sin, [B or 1, N, 1, K / 2], or [M, 1, K / 2] where tokens are packed
    )
    packing: Packing | None = None


class TurnedAttention(nn.Module):
    """Multi-head attention whose rotations are given: x [B, N, D], or packed [M, D], -> the same.

    Args:
        q_norm, k_norm: of queries and keys per head before they are turned; FiTv2 has "layer".
        turns_values: values are turned too.
    """

    heeds = (ATTEND,)

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        q_norm: Norm,
        k_norm: Norm,
        qkv_bias: bool = True,
        turns_values: bool = False,
    ):
        super().__init__()
        self.num_heads, self.head_dim, self.turns_values = num_heads, dim // num_heads, turns_values
        self.q_norm, self.k_norm = make_norm(q_norm, self.head_dim), make_norm(k_norm, self.head_dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, layout: TurnedLayout, cache: Cache | None = None) -> Tensor:
        assert layout.table is not None
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)  # [..., H, K] each
        q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate(y, layout.table).to(v.dtype) for y in (q, k))  # the rotation runs in float32 under autocast
        v = rotate(v, layout.table).to(v.dtype) if self.turns_values else v
        packing = layout.packing
        if packing is None:
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # [B, H, N, K] each
            out = attend(q, k, v, grid=layout.grid, valid=None, cache=cache)
            return self.proj(out.transpose(1, 2).flatten(2))
        padded = [packing.pad(y) for y in (q, k, v)]
        outs = []
        for group in packing.groups:
            q, k, v = (group.of(y).transpose(1, 2) for y in padded)
            # Packed tokens fill no grid any more; each sample keeps its own raster order.
            out = attend(q, k, v, grid=None, valid=group.held, cache=cache)
            outs.append(out.transpose(1, 2).flatten(0, 1).flatten(1))
        return self.proj(packing.unpad(torch.cat(outs)))


class FiT(ModelMixin, ConfigMixin):
    """x [B, C, *grid], t, label -> [B, C or 2 C, *grid]. A fresh network returns 0.

    Args:
        channels: C.
        num_classes: classes that cond["label"] counts; 0 = unconditional.
        grid: cells per axis while training; where sizes are mixed, of the square that they are as large as.
        dim, depth, num_heads: of FiTv2, B 768, 15 and 12; XL 1152, 36 and 16; 3B 2304, 40 and 24; of FiT, XL 1152, 28 and 16.
        patch_size: cells per axis of a token: one number, or one per axis.
        mlp_dim: hidden channels of the gated perceptron; by default 8/3 dim as in FiTv2; FiT has 4 dim.
        shared_adaln: one modulation for all blocks, to which each adds one of low rank, as FiTv2; else one of full rank in each block, as FiT.
        adaln_rank: that rank; by default dim / 4.
        qk_norm: layer norm of queries and keys, as FiTv2, or another by its word (nn.norm).
        k_norm: of keys alone, where it is not that of queries.
        norm: before attention, perceptrons and head.
        mlp: "swiglu", or an ordinary perceptron with a "gelu" in its tanh form.
        adaln: how shifts, scales and gates come from the condition: "linear", or gated perceptrons, "swiglu"; these only without shared_adaln.
        qkv_bias, mlp_bias: as published True.
        mixer: in place of attention, a part or a list of parts repeated through the depth; positions are then its own affair.
        rope: frequencies of rotary positions on grids larger than the trained one, see nn.extrapolation.
        rope_base: of the frequencies.
        rope_per_axis: every axis by its own length; else all by the longest.
        rope_gain: of the attention logits by the number of tokens.
        rope_trained: tokens along an axis while training; by default along the longest of the grid, as in FiT, whatever sizes were mixed.
        rope_values: values are turned as queries and keys are.
        rope_lengths: tokens along every axis that all samples are treated as having; by default each its own.
        learn_sigma: two outputs per channel, as FiT.
        time_scale: what t is multiplied by before it becomes waves.
        time_shift: s, where t is seen as s t / (1 + (s - 1) t).
        null_class: whether the table of classes has a row for "none".
        dropout: on both residual branches.

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
        num_heads: int = 6,
        patch_size: PatchSize = 2,
        mlp_dim: int | None = None,
        shared_adaln: bool = True,
        adaln_rank: int | None = None,
        qk_norm: bool | Norm = True,
        k_norm: Norm | None = None,
        norm: Norm = "layer",
        mlp: Literal["swiglu", "gelu"] = "swiglu",
        adaln: Literal["linear", "swiglu"] = "linear",
        qkv_bias: bool = True,
        mlp_bias: bool = True,
        mixer: MixerSpec | None = None,
        rope: Method = "plain",
        rope_base: float = 10_000.0,
        rope_per_axis: bool = True,
        rope_gain: Gain = "none",
        rope_trained: int | None = None,
        rope_values: bool = False,
        rope_lengths: tuple[int, ...] | None = None,
        learn_sigma: bool = False,
        time_scale: float = 1.0,
        time_shift: float = 1.0,
        null_class: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        if depth < 1:
            raise UsageError(f"backbone.depth={depth} must be at least 1")
        if num_heads < 1 or dim % num_heads:
            raise UsageError(f"backbone.num_heads={num_heads} does not divide the width dim={dim}")
        if adaln == "swiglu" and shared_adaln:
            raise UsageError("backbone.adaln=swiglu goes only with backbone.shared_adaln=false")
        if time_shift <= 0:
            raise UsageError(f"backbone.time_shift={time_shift} must be positive")
        if rope_lengths is not None and (len(rope_lengths) != len(grid) or min(rope_lengths) < 1):
            raise UsageError(
                f"backbone.rope_lengths={tuple(rope_lengths)} must be one positive number for each of the {len(grid)} axes"
            )
        self.gradient_checkpointing = False
        self.time_shift = time_shift
        self.out_channels = (2 if learn_sigma else 1) * channels
        self.sides = patch_sides(patch_size, len(grid))
        self.head_dim = dim // num_heads
        self.has_mixer = mixer is not None
        trained = token_grid(tuple(grid), self.sides)
        self.rule = Extrapolation(
            rope,
            rope_per_axis,
            rope_gain,
            max(trained) if rope_trained is None else rope_trained,
            rope_base,
            None if rope_lengths is None else tuple(rope_lengths),
        )
        cells = torch.Size(self.sides).numel()
        rank = (dim // 4 if adaln_rank is None else adaln_rank) if shared_adaln else None
        make_mixer = None if mixer is None else maker("mixer", mixer)
        qk: Norm = ("layer" if qk_norm else "none") if isinstance(qk_norm, bool) else qk_norm
        hidden = 8 * dim // 3 if mlp_dim is None else mlp_dim

        def modulation(inner: int, out: int) -> nn.Module | None:
            return GatedMLP(dim=dim, hidden=inner, out=out) if adaln == "swiglu" else None

        self.embed = nn.Linear(channels * cells, dim)
        self.condition = Condition(
            num_classes=num_classes, dim=dim, time_scale=time_scale, null_class=null_class, act=adaln != "swiglu"
        )
        self.modulation = nn.Linear(dim, 6 * dim) if shared_adaln else None
        self.blocks = nn.ModuleList(
            AdaLNBlock(
                dim=dim,
                mixer=TurnedAttention(
                    dim=dim,
                    num_heads=num_heads,
                    q_norm=qk,
                    k_norm=qk if k_norm is None else k_norm,
                    qkv_bias=qkv_bias,
                    turns_values=rope_values,
                )
                if make_mixer is None
                else make_mixer(dim=dim, layer=i),
                mlp=GatedMLP(dim=dim, hidden=hidden, bias=mlp_bias)
                if mlp == "swiglu"
                else MLP(dim=dim, mlp_ratio=hidden / dim, approximate="tanh", bias=mlp_bias),
                rank=rank,
                modulation=modulation(dim // 4 * 3, 6 * dim),
                norm=norm,
                dropout=dropout,
            )
            for i in range(depth)
        )
        self.head = AdaLNHead(
            dim=dim, width=self.out_channels * cells, norm=norm, modulation=modulation(dim // 2, 2 * dim)
        )
        self.initialise()

    def initialise(self) -> None:
        """As published. Other mixers than attention keep what they were made with."""
        init_linears(self.embed)
        if self.modulation is not None:
            init_zero(self.modulation)
        for block in self.blocks:
            assert isinstance(block, AdaLNBlock)
            block.initialise()
            if isinstance(block.mixer, TurnedAttention):
                init_linears(block.mixer)

    def forward(self, x: Tensor, t: Tensor | None, cond: Cond, layout: Layout, cache: Cache | None = None) -> Tensor:
        """
        Args:
            x: [B, C, *grid]; or, with a layout without a grid, tokens [B, C * cells of a patch, N] at layout.coords [B or 1, N, A], in tokens, the channel
                slowest; sizes of samples are then read from the coordinates of real tokens.
            t: a number, one per sample [B], or None where time means nothing.
            cond: "label" [B] int64, -1 = null class.
            layout: `valid` [B, cells of x], or [B, N] of tokens.
            cache: handed to attention or mixers; may skip blocks (see nn.through).

        Returns: [B, out_channels, *grid], or [B, out_channels * cells of a patch, N]; 0 at padding.
        Raises: UsageError for a grid that patches do not fill.
        """
        B = x.shape[0]
        laid_out = token_layout(x, layout, self.sides) if layout.grid is not None else layout
        patches = patchify(x, self.sides) if layout.grid is not None else x.transpose(1, 2)  # [B, N, C']
        N = patches.shape[1]
        tokens = (
            laid_out if self.has_mixer else self.turned(laid_out, B, is_one_group=cache is not None and ATTEND in cache)
        )
        packing = tokens.packing if isinstance(tokens, TurnedLayout) else None
        sample = None if packing is None else packing.sample
        h = self.embed(patches if packing is None else packing.pack(patches))  # [B, N, D] or [M, D]
        if t is not None and self.time_shift != 1:
            t = self.time_shift * t / (1 + (self.time_shift - 1) * t)
        c = self.condition(t, cond, B)  # [B, D]
        shared = None if self.modulation is None else self.modulation(c)  # [B, 6 D]

        def run(i: int, h: Tensor) -> Tensor:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                return self._gradient_checkpointing_func(self.blocks[i], h, c, tokens, cache, shared, sample)
            return self.blocks[i](h, c, tokens, cache, shared, sample)

        h = through(len(self.blocks), h, run, cache)
        out = self.head(h, c, sample)
        out = real_only(out, laid_out) if packing is None else packing.unpack(out, N)
        return out.transpose(1, 2) if laid_out.grid is None else unpatchify(out, laid_out.grid, self.sides)

    def turned(self, layout: Layout, batch_size: int, is_one_group: bool = False) -> TurnedLayout:
        """The layout with its rotations, packed where there is padding.

        Args:
            is_one_group: what stands in for attention keeps something for every sample, so that it must see them together.
        """
        coords, valid, grid = layout.coords, layout.valid, layout.grid
        if grid is not None and valid is None:
            return TurnedLayout(coords, grid, table=grid_table(grid, self.head_dim, self.rule, coords.device))
        coords = coords.expand(batch_size, -1, -1)
        if valid is None:
            valid = torch.ones(coords.shape[:2], dtype=torch.bool, device=coords.device)
        # Tokens along every axis of each sample: the largest coordinate of a real token, plus 1.
        sizes = torch.where(valid.unsqueeze(-1), coords, 0).amax(1) + 1  # [B, A]
        packing = Packing.of(valid, 1.0 if is_one_group else SLACK)
        cos, sin = turning_table(coords, sizes, self.head_dim, self.rule)
        return TurnedLayout(coords, grid, valid, table=(packing.pack(cos), packing.pack(sin)), packing=packing)


@lru_cache(maxsize=64)
def grid_table(
    grid: tuple[int, ...], head_dim: int, rule: Extrapolation, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The rotations of a full grid, [1, N, 1, head_dim / 2] each."""
    with torch.inference_mode(False), torch.no_grad():  # training may keep what was first asked for while sampling
        sizes = torch.tensor([grid], dtype=torch.float32, device=device)
        return turning_table(dense_layout(grid, device=device).coords, sizes, head_dim, rule)
