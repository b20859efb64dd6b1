"""Half of the channels scanned over space, half over wavelet bands (Phung et al., "DiMSUM", NeurIPS 2024).

Differences from the release: the projection of the condition inside each Mamba is left out (the released kernel overwrites it before it is read: no output
depends on it); grids need not be square. Between halves there is full attention, so the network is quadratic in the number of tokens.

How x becomes tokens: genkit/nn/patch.py. Scans would carry padding into real tokens, so padded batches are refused.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, addcmul, nn

from genkit.errors import UsageError
from genkit.interfaces import ATTEND, BLOCKS, Cache, Cond, Layout
from genkit.mixers.attention import Attention
from genkit.mixers.mamba import Mamba, SelectiveScan
from genkit.nn.adaln import AdaLNBlock, AdaLNHead, init_zero
from genkit.nn.attend import attend
from genkit.nn.condition import Condition
from genkit.nn.drop_path import DropPath
from genkit.nn.gated_mlp import GatedMLP
from genkit.nn.grid_positions import GridPositions
from genkit.nn.layout import dense_layout
from genkit.nn.linear_map import Projection
from genkit.nn.norm import RMSNorm
from genkit.nn.patch import PatchSize, patch_sides, patchify, token_grid, token_layout, unpatchify
from genkit.nn.scan_orders import ScanOrder
from genkit.nn.through import through
from genkit.nn.wavelet import SIDE, BandLayout, haar_packet, inverse_haar_packet
from genkit.registry import MixerSpec, maker

SPATIAL: MixerSpec = {"type": "mamba", "order": "sweep-4"}
FREQUENCY: MixerSpec = {"type": "mamba"}
EPS = 1e-5  # of the norms of the stream


class Branch(nn.Module):
    """s + gate mixer(s (1 + scale) + shift) for s [B, N, d], which is normed already; shift, scale and gate from the condition c [B, D]."""

    def __init__(self, *, dim: int, width: int, mixer: nn.Module):
        super().__init__()
        self.mixer = mixer
        self.modulation = nn.Linear(dim, 3 * width)

    def forward(self, s: Tensor, c: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        shift, scale, gate = self.modulation(c).unsqueeze(1).chunk(3, dim=-1)
        return addcmul(s, gate, self.mixer(addcmul(shift, s, 1 + scale), layout, cache))


class CrossFusion(nn.Module):
    """Two sequences a and b [B, N, d] -> [B, N, 2 d]: each is read with the queries of the other."""

    heeds = (ATTEND,)

    def __init__(self, *, width: int, num_heads: int):
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise UsageError(f"backbone.fusion_heads={num_heads} does not divide half the width, {width}")
        self.num_heads = num_heads
        self.qkv1 = nn.Linear(width, 3 * width)
        self.qkv2 = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(2 * width, 2 * width)

    def forward(self, a: Tensor, b: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        q1, k1, v1 = self._heads(self.qkv1(a))
        q2, k2, v2 = self._heads(self.qkv2(b))
        pairs = (q1, k2, v2), (q2, k1, v1)
        read = [attend(*pair, grid=layout.grid, valid=None, cache=cache) for pair in pairs]  # [B, H, N, K]
        return self.proj(torch.cat([r.transpose(1, 2).flatten(2) for r in read], dim=-1))

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, 3 d] -> three [B, H, N, d / H]."""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v


class Block(nn.Module):
    """One layer: u = norm(stream), its halves through the two branches, fused and added to u, then a gated perceptron.

    Args:
        columns: the windows of the frequency branch, and the tokens in each, go down before they go across.
    """

    def __init__(
        self,
        *,
        dim: int,
        spatial: nn.Module,
        frequency: nn.Module,
        columns: bool,
        fusion_heads: int,
        mlp_ratio: float,
        band_layout: BandLayout,
        drop_path: float,
    ):
        super().__init__()
        self.columns, self.band_layout = columns, band_layout
        self.drop_path = DropPath(drop_path)
        self.norm = RMSNorm(dim, eps=EPS)
        self.spatial = Branch(dim=dim, width=dim // 2, mixer=spatial)
        self.frequency = Branch(dim=dim, width=dim // 2, mixer=frequency)
        self.fusion = CrossFusion(width=dim // 2, num_heads=fusion_heads)
        self.norm_mlp = RMSNorm(dim, eps=EPS)
        self.mlp = GatedMLP(dim=dim, hidden=int(mlp_ratio * dim), act="gelu")
        self.modulation = nn.Linear(dim, 3 * dim)

    def forward(
        self, h: Tensor, stream: Tensor, c: Tensor, layout: Layout, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor]:
        """h [B, N, D], the output of the layer before, and the stream it is added to, float32 or wider -> both, after this layer."""
        stream = stream + self.drop_path(h).to(stream.dtype)
        u = self.norm(stream.to(h.dtype))
        a, b = u.chunk(2, dim=-1)
        spatial, bands = self.spatial(a, c, layout, cache), self.scan_bands(b, c, layout, cache)
        h = u + self.fusion(spatial, bands, layout, cache)
        shift, scale, gate = self.modulation(c).unsqueeze(1).chunk(3, dim=-1)
        return addcmul(h, gate, self.mlp(addcmul(shift, self.norm_mlp(h), 1 + scale))), stream

    def scan_bands(self, b: Tensor, c: Tensor, layout: Layout, cache: Cache | None) -> Tensor:
        """The frequency branch, [B, N, D / 2] -> the same: to wavelet bands, window by window through the mixer, and back."""
        assert layout.grid is not None
        Y, X = layout.grid
        bands = haar_packet(b, (Y, X), self.band_layout)
        order = window_order(Y, X, self.columns, b.device)
        # To the mixer this is a line of tokens. Its place in a cache would be that of the spatial one.
        mixed = self.frequency(order.visit(bands), c, dense_layout((Y * X,), device=b.device), None)
        return inverse_haar_packet(order.put_back(mixed), (Y, X), self.band_layout)


class DiMSUM(ModelMixin, ConfigMixin):
    """x [B, C, Y, X], t, label -> [B, C or 2 C, Y, X]. A fresh network returns 0.

    Args:
        channels: C.
        num_classes: classes that cond["label"] counts; 0 = unconditional.
        grid: cells per axis while training; any other whose tokens make multiples of 4 may follow.
        dim, depth: of the published sizes, B 768 and 12, L 1024 and 16, XL 1152 and 24.
        patch_size: cells per axis of a token.
        mixer: of the spatial half, a part or a list of parts repeated through the depth; it is made for dim / 2.
        frequency_mixer: of the other half; it sees a line of tokens.
        attention_every: after every so many layers comes one transformer block, always the same; 0 = never.
        num_heads, fusion_heads: of that block, and of the attention between halves.
        mlp_ratio: hidden channels of the gated perceptrons per channel.
        positions: "table", trained; "sincos", fixed waves.
        band_layout: see nn.wavelet; "release" for the released weights.
        learn_sigma: two outputs per channel, the second for variances.
        null_class: whether the table of classes has a row for "none".
        time_scale: what t is multiplied by before it becomes waves.
        drop_path: probability that a sample skips what the last layer adds to the stream; grows from 0 with the depth.

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
        depth: int = 8,
        patch_size: PatchSize = 2,
        mixer: MixerSpec = SPATIAL,
        frequency_mixer: MixerSpec = FREQUENCY,
        attention_every: int = 4,
        num_heads: int = 16,
        fusion_heads: int = 8,
        mlp_ratio: float = 4.0,
        positions: Literal["table", "sincos"] = "table",
        band_layout: BandLayout = "release",
        learn_sigma: bool = False,
        null_class: bool = True,
        time_scale: float = 1.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        if depth < 1 or attention_every < 0:
            raise UsageError(
                f"backbone.depth={depth} must be at least 1, backbone.attention_every={attention_every} at least 0"
            )
        if dim % 2 or len(grid) != 2:
            raise UsageError(f"dimsum needs an even width and a grid of two axes, found dim={dim}, grid={tuple(grid)}")
        make_spatial, make_frequency = maker("mixer", mixer), maker("mixer", frequency_mixer)
        self.gradient_checkpointing = False
        self.attention_every = attention_every
        self.out_channels = (2 if learn_sigma else 1) * channels
        self.sides = patch_sides(patch_size, len(grid))
        cells = torch.Size(self.sides).numel()
        self.embed = nn.Linear(channels * cells, dim)
        self.position = GridPositions(grid=token_grid(tuple(grid), self.sides), dim=dim, kind=positions)
        self.condition = Condition(num_classes=num_classes, dim=dim, time_scale=time_scale, null_class=null_class)
        self.blocks = nn.ModuleList(
            Block(
                dim=dim,
                spatial=make_spatial(dim=dim // 2, layer=i),
                frequency=make_frequency(dim=dim // 2, layer=i),
                columns=i % 2 == 1,
                fusion_heads=fusion_heads,
                mlp_ratio=mlp_ratio,
                band_layout=band_layout,
                drop_path=drop_path * max(i - 1, 0) / max(depth - 1, 1),
            )
            for i in range(depth)
        )
        self.shared: AdaLNBlock | None = None  # a block that is never called would have no gradient
        if 0 < attention_every <= depth:
            self.shared = AdaLNBlock(
                dim=dim,
                mixer=Attention(dim=dim, layer=depth, num_heads=num_heads, qk_norm=False, rope=False),
                mlp=GatedMLP(dim=dim, hidden=int(mlp_ratio * dim), act="gelu"),
            )
        self.head = AdaLNHead(dim=dim, width=self.out_channels * cells)
        self.initialise()

    def initialise(self) -> None:
        """As published: linear layers as torch makes them, without biases; only what makes the output, and the modulation of the layers' own perceptrons,
        is zero, so that a fresh layer is not the identity."""
        depth = len(self.blocks)
        nn.init.xavier_uniform_(self.embed.weight)
        nn.init.zeros_(self.embed.bias)
        for module in [*self.blocks, *([self.shared] if self.shared is not None else [])]:
            for part in module.modules():
                if isinstance(part, nn.Linear) and part.bias is not None:
                    nn.init.zeros_(part.bias)
                if isinstance(part, Mamba | SelectiveScan):
                    for child in part.children():
                        if isinstance(child, Projection):
                            nn.init.kaiming_uniform_(child.weight, a=math.sqrt(5))
                if isinstance(part, Mamba):
                    part.out_proj.weight.data /= math.sqrt(depth)
        for block in self.blocks:
            assert isinstance(block, Block)
            init_zero(block.modulation)

    def forward(self, x: Tensor, t: Tensor | None, cond: Cond, layout: Layout, cache: Cache | None = None) -> Tensor:
        """
        Args:
            x: [B, C, Y, X].
            t: a number, one per sample [B], or None where time means nothing.
            cond: "label" [B] int64, -1 = null class.
            layout: `valid` must be None; nothing else of it is read.
            cache: handed to the spatial mixers and to attention; may skip blocks (see nn.through).

        Returns: [B, out_channels, Y, X].
        Raises: UsageError for padding, and for a grid that patches and cells of 4x4 tokens do not fill.
        """
        if layout.valid is not None:
            raise UsageError("backbone.type=dimsum cannot be padded: its scans would carry padding into real tokens")
        tokens = token_layout(x, layout, self.sides)
        assert tokens.grid is not None
        h = self.embed(patchify(x, self.sides))  # [B, N, D]
        h = h + self.position(tokens.grid, x.device).to(h.dtype)
        c = self.condition(t, cond, x.shape[0])  # [B, D]

        def run(i: int, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            h, stream = self._run(self.blocks[i], *state, c, tokens, cache)
            if self.shared is not None and (i + 1) % self.attention_every == 0:
                h = self._run(self.shared, h, c, tokens, cache)
            return h, stream

        stream = torch.zeros_like(h, dtype=torch.promote_types(h.dtype, torch.float32))
        h, _ = through(len(self.blocks), (h, stream), run, cache)
        # What is left in the stream is not used, as released.
        return unpatchify(self.head(h, c), tokens.grid, self.sides)

    def _run(self, block: nn.Module, *args: object) -> Any:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)


@lru_cache(maxsize=64)
def window_order(Y: int, X: int, columns: bool, device: torch.device | str = "cpu") -> ScanOrder:
    """The tokens of a grid in 4x4 windows of (Y / 4) x (X / 4) tokens: windows and the tokens in each row by row, or column by column."""
    with torch.inference_mode(False):
        windows = torch.arange(Y * X, device=device).view(SIDE, Y // SIDE, SIDE, X // SIDE)
        index = windows.permute(2, 0, 3, 1) if columns else windows.permute(0, 2, 1, 3)
        index = index.reshape(-1)
        return ScanOrder(index, index.argsort(), is_raster=False)
