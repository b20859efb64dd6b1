"""Long grids in tiles that talk through a few latents (Chen and Li, "FIT: Far-reaching Interleaved Transformers", 2023; for diffusion as in google-research
pix2seq's FITDenoiser, and in Menapace et al., "Snap Video", CVPR 2024).

Local layers run within the tokens of a tile, global layers between the latents of all tiles; latents read their tile before, and the tile reads them after.
The cost is N n for the local part and (N m / n)^2 for the global one, N tokens in tiles of n with m latents each.

Differences from the paper: latents begin as m learned vectors plus waves of their tile's place, instead of a table of all latents, so that any grid of whole
tiles is taken; the last layer begins at 0; other mixers may stand in for attention. t and the class are tokens that latents attend to.

How x becomes tokens, and what is read of the layout: genkit/nn/patch.py.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from genkit.errors import UsageError
from genkit.interfaces import Cache, Cond, Layout
from genkit.mixers.attention import Attention
from genkit.nn.adaln import init_linears, init_zero
from genkit.nn.embed import LabelEmbedding
from genkit.nn.grid_positions import grid_waves
from genkit.nn.layout import dense_layout
from genkit.nn.mlp import MLP
from genkit.nn.patch import PatchSize, patch_sides, patchify, real_only, token_grid, token_layout, unpatchify
from genkit.nn.timestep import time_waves
from genkit.registry import MixerSpec, maker

ATTENTION: MixerSpec = {"type": "attention", "num_heads": 4, "qk_norm": False, "rope": False}
LATENTS = "fit_interleaved.latents"  # the key under which a cache carries them from one step of sampling to the next
EPS = 1e-6


class Layer(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)), [B, N, D] -> the same."""

    def __init__(self, *, dim: int, mixer: nn.Module, mlp_ratio: float):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.mixer = mixer
        self.norm_mlp = nn.LayerNorm(dim, eps=EPS)
        self.mlp = MLP(dim=dim, mlp_ratio=mlp_ratio)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        x = x + self.mixer(self.norm(x), layout, cache)
        return x + self.mlp(self.norm_mlp(x))


class CrossAttention(nn.Module):
    """x [B, N, D] + what it reads in y [B, L, E]; heads together are as wide as the narrower of the two.

    With mlp_ratio a perceptron follows, x + mlp(norm(x)).
    """

    def __init__(self, *, dim: int, from_dim: int, num_heads: int, mlp_ratio: float | None = None):
        super().__init__()
        width = min(dim, from_dim)
        if num_heads < 1 or width % num_heads:
            raise UsageError(
                f"{num_heads} heads do not divide the width {width}; see backbone.mixer, backbone.global_mixer"
            )
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.norm_from = nn.LayerNorm(from_dim, eps=EPS)
        self.q = nn.Linear(dim, width)
        self.kv = nn.Linear(from_dim, 2 * width)
        self.proj = nn.Linear(width, dim)
        self.mlp: MLP | None = None
        if mlp_ratio is not None:
            self.norm_mlp = nn.LayerNorm(dim, eps=EPS)
            self.mlp = MLP(dim=dim, mlp_ratio=mlp_ratio)

    def forward(self, x: Tensor, y: Tensor, valid: Tensor | None = None) -> Tensor:
        """valid [B, L] bool: which of y may be read."""
        q = self.q(self.norm(x)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(self.norm_from(y)).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = scaled_dot_product_attention(q, k, v, attn_mask=None if valid is None else valid[:, None, None])
        x = x + self.proj(out.transpose(1, 2).flatten(2))
        return x if self.mlp is None else x + self.mlp(self.norm_mlp(x))


class ScalarEmbedding(nn.Module):
    """A number per sample [B] -> [B, dim]: dim / 4 waves, brought to mean 0 and deviation 1 over the channels, through a perceptron."""

    def __init__(self, *, dim: int):
        super().__init__()
        if dim % 8:
            raise UsageError(f"backbone.latent_dim={dim} must be a multiple of 8")
        self.up = nn.Linear(dim // 4, dim)
        self.down = nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        waves = time_waves(t, self.up.in_features)
        waves = (waves - waves.mean(-1, keepdim=True)) / waves.std(-1, correction=0, keepdim=True)
        return self.down(nn.functional.silu(self.up(waves.to(self.up.weight.dtype))))


class Stage(nn.Module):
    """Local layers, then reading, the condition, global layers and writing. A stage without global layers ends after the local ones."""

    def __init__(
        self,
        *,
        local: list[Layer],
        far: list[Layer],
        dim: int,
        latent_dim: int,
        heads: tuple[int, int],
        has_write: bool,
        cross_ratio: float | None,
    ):
        super().__init__()
        self.local, self.far = nn.ModuleList(local), nn.ModuleList(far)
        self.read: CrossAttention | None = None
        self.told: CrossAttention | None = None
        self.write: CrossAttention | None = None
        if far:
            self.read = CrossAttention(dim=latent_dim, from_dim=dim, num_heads=min(heads), mlp_ratio=cross_ratio)
            self.told = CrossAttention(dim=latent_dim, from_dim=latent_dim, num_heads=heads[1])
        if has_write:
            self.write = CrossAttention(dim=dim, from_dim=latent_dim, num_heads=min(heads), mlp_ratio=cross_ratio)

    def forward(
        self, x: Tensor, z: Tensor, told: Tensor, tile: Layout, latents: Layout, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            x: [B T, n, c], tokens of tiles.
            z: [B, T m, d], latents.
            told: [B, L, d], the condition.
            tile, latents: layouts of x and of z.
        """
        for layer in self.local:
            x = layer(x, tile, cache)
        if self.read is None or self.told is None:
            return x, z
        tiles, (batch, count, width) = x.shape[0], z.shape
        z = self.read(z.reshape(tiles, -1, width), x, tile.valid).reshape(batch, count, width)
        z = self.told(z, told)
        for layer in self.far:
            z = layer(z, latents, cache)
        if self.write is not None:
            x = self.write(x, z.reshape(tiles, -1, width))
        return x, z


class FITInterleaved(ModelMixin, ConfigMixin):
    """x [B, C, *grid], t, label -> [B, C or 2 C, *grid]. A fresh network returns 0.

    Args:
        channels: C.
        num_classes: classes that cond["label"] counts; 0 = unconditional.
        grid: cells per axis while training; any other made of whole tiles may follow.
        dim, latent_dim: c and d, of tokens and of latents.
        layers: as in the paper: (local) global (local) global ... (local). It ends with local layers, else the last global ones reach no token.
        tile: tokens along the axes of a tile: one number, or one per axis; of video, all frames by some rows and columns.
        latents_per_tile: m.
        patch_size: cells per axis of a token.
        mixer, global_mixer: of the local and the global layers; the latter see a line of T m latents, tile by tile.
        num_heads, latent_heads: of the attention between tokens and latents (the fewer of the two), and to the condition (the latter).
        mlp_ratio: hidden channels of the perceptrons per channel.
        cross_mlp: a perceptron follows each reading and writing; Snap Video has it instead of local layers, layers (0)4(0)4 .. (0).
        self_cond: share of a batch that in training first runs without, and then with the latents of that run (0.5 in the release; Snap Video 0.9). Above 0,
            a cache given while sampling carries the latents from step to step.
        time_scale: t is multiplied by it; 1000 for t in [0, 1], 1 for steps 0 .. 999.
        learn_sigma: two outputs per channel.

    Raises: UsageError for sizes that do not fit each other.
    """

    _supports_gradient_checkpointing = True
    answers = "noisy latents"

    @register_to_config
    def __init__(
        self,
        *,
        channels: int,
        num_classes: int,
        grid: tuple[int, ...],
        dim: int = 96,
        latent_dim: int = 128,
        layers: str = "(1)2(1)2(1)",
        tile: PatchSize = 4,
        latents_per_tile: int = 4,
        patch_size: PatchSize = 2,
        mixer: MixerSpec = ATTENTION,
        global_mixer: MixerSpec = ATTENTION,
        num_heads: int = 4,
        latent_heads: int = 4,
        mlp_ratio: float = 4.0,
        cross_mlp: bool = False,
        self_cond: float = 0.0,
        time_scale: float = 1000.0,
        learn_sigma: bool = False,
    ):
        super().__init__()
        if latents_per_tile < 1 or not 0 <= self_cond <= 1:
            raise UsageError(
                f"backbone.latents_per_tile={latents_per_tile} must be at least 1, backbone.self_cond={self_cond} in [0, 1]"
            )
        self.gradient_checkpointing = False
        self.out_channels = (2 if learn_sigma else 1) * channels
        self.sides, self.tile = patch_sides(patch_size, len(grid)), patch_sides(tile, len(grid))
        token_grid(token_grid(tuple(grid), self.sides), self.tile)  # refuses what does not fit, before training does
        cells, per_tile = torch.Size(self.sides).numel(), torch.Size(self.tile).numel()
        self.time_scale, self.self_cond = time_scale, self_cond
        self.embed = nn.Linear(channels * cells, dim)
        self.norm_in = nn.LayerNorm(dim, eps=EPS)
        self.places = nn.Parameter(torch.empty(per_tile, dim))
        self.latents = nn.Parameter(torch.empty(latents_per_tile, latent_dim))
        self.time = ScalarEmbedding(dim=latent_dim)
        self.label = LabelEmbedding(num_classes=num_classes, dim=latent_dim)
        self.before: MLP | None = None
        if self_cond > 0:
            self.norm_before = nn.LayerNorm(latent_dim, eps=EPS)
            self.before = MLP(dim=latent_dim, mlp_ratio=mlp_ratio)
            self.gain_before = nn.LayerNorm(latent_dim, eps=EPS)
        counts = parse_layers(layers)
        make, make_far = maker("mixer", mixer), maker("mixer", global_mixer)
        number = iter(range(sum(map(sum, counts))))  # of layers, in the order they run
        self.stages = nn.ModuleList(
            Stage(
                local=[
                    Layer(dim=dim, mixer=make(dim=dim, layer=next(number)), mlp_ratio=mlp_ratio) for _ in range(local)
                ],
                far=[
                    Layer(dim=latent_dim, mixer=make_far(dim=latent_dim, layer=next(number)), mlp_ratio=mlp_ratio)
                    for _ in range(far)
                ],
                dim=dim,
                latent_dim=latent_dim,
                heads=(num_heads, latent_heads),
                has_write=i + 1 < len(counts),
                cross_ratio=mlp_ratio if cross_mlp else None,
            )
            for i, (local, far) in enumerate(counts)
        )
        self.norm_out = nn.LayerNorm(dim, eps=EPS)
        self.head = nn.Linear(dim, self.out_channels * cells)
        self.initialise()

    def initialise(self) -> None:
        """As published, but for the last layer. Mixers other than attention keep what they were made with."""
        for module in self.modules():
            if isinstance(module, CrossAttention | ScalarEmbedding | MLP | Attention):
                init_linears(module)
        init_linears(self.embed)
        for table in (self.places, self.latents, self.label.table.weight):
            nn.init.trunc_normal_(table, std=0.02)
        init_zero(self.head)
        if self.before is not None:
            init_zero(self.gain_before)  # latents of an earlier run have no say at first

    def forward(self, x: Tensor, t: Tensor | None, cond: Cond, layout: Layout, cache: Cache | None = None) -> Tensor:
        """
        Args:
            x: [B, C, *grid].
            t: a number, one per sample [B], or None where time means nothing.
            cond: "label" [B] int64, -1 = null class.
            layout: its `valid` [B, cells of x] says which cells are real; nothing else of it is read.
            cache: handed to the mixers; with self_cond, holds the latents of the last call.

        Returns: [B, out_channels, *grid], 0 at padding.
        Raises: UsageError for a grid that patches and tiles do not fill.
        """
        B = x.shape[0]
        tokens = token_layout(x, layout, self.sides)
        assert tokens.grid is not None
        tiles = token_grid(tokens.grid, self.tile)  # T of them
        h = unpatchify(self.embed(patchify(x, self.sides)), tokens.grid, (1,) * len(tiles))  # [B, c, *token grid]
        h = patchify(h, self.tile).unflatten(-1, (-1, len(self.places)))  # [B, T, c, n]
        h = self.norm_in(h.transpose(2, 3)) + self.places  # [B, T, n, c]
        told = [self.label(cond, B)]
        if t is not None:
            told.insert(0, self.time(self.time_scale * t.float().expand(B)))
        prev = None if cache is None or self.before is None else cache.get(LATENTS)
        if self.training and self.self_cond > 0:
            with torch.no_grad():
                _, first = self.run(h, torch.stack(told, 1), tokens, tiles, None, cache)
            chosen = torch.rand(B, 1, 1, device=x.device) < self.self_cond
            prev = torch.where(chosen, first, 0)
        h, z = self.run(h, torch.stack(told, 1), tokens, tiles, prev, cache)
        if cache is not None and self.before is not None:
            cache[LATENTS] = z.detach()
        out = self.head(self.norm_out(h))  # [B, T, n, C']
        out = unpatchify(out.transpose(2, 3).flatten(2), tiles, self.tile)  # [B, C', *token grid]
        out = real_only(out.flatten(2).transpose(1, 2), tokens)
        return unpatchify(out, tokens.grid, self.sides)

    def run(
        self,
        h: Tensor,
        told: Tensor,
        tokens: Layout,
        tiles: tuple[int, ...],
        prev: Tensor | None,
        cache: Cache | None,
    ) -> tuple[Tensor, Tensor]:
        """All stages: h [B, T, n, c], told [B, L, d], latents of an earlier run [B, T m, d] or None = 0 -> (h, latents)."""
        B, T, n, _ = h.shape
        places = grid_waves(tiles, self.latents.shape[1], None, h.device).to(h.dtype)  # [1, T, d]
        z = (self.latents + places.unsqueeze(2)).flatten(1, 2).expand(B, -1, -1)  # [B, T m, d]
        if self.before is not None:
            prev = torch.zeros_like(z) if prev is None else prev
            z = z + self.gain_before(prev + self.before(self.norm_before(prev)))
        tile_layout, latent_layout = self.layouts(tokens, T, n, h.device)
        x = h.flatten(0, 1)
        for stage in self.stages:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x, z = self._gradient_checkpointing_func(stage, x, z, told, tile_layout, latent_layout, cache)
            else:
                x, z = stage(x, z, told, tile_layout, latent_layout, cache)
        return x.unflatten(0, (B, T)), z

    def layouts(self, tokens: Layout, T: int, n: int, device: torch.device) -> tuple[Layout, Layout]:
        """Of the tokens of a tile [B T, n], and of all latents [B, T m]. Latents of a tile without a real token are padding."""
        m = self.latents.shape[0]
        tile, latents = dense_layout(self.tile, device=device), dense_layout((T * m,), device=device)
        if tokens.valid is None:
            return tile, latents
        assert tokens.grid is not None
        valid = patchify(tokens.valid.unflatten(1, tokens.grid).unsqueeze(1), self.tile)  # [B, T, n]
        held = valid.any(-1)  # [B, T]
        # Attention within an empty tile would be NaN; what comes out of it is read by nobody.
        inside = (valid | ~held.unsqueeze(-1)).flatten(0, 1)
        among = (held | ~held.any(-1, keepdim=True)).repeat_interleave(m, dim=1)
        return replace(tile, valid=inside), replace(latents, valid=among)


def parse_layers(layers: str) -> list[tuple[int, int]]:
    """(local, global) of every stage: "(2)4(1)" -> [(2, 4), (1, 0)]. Raises UsageError for another form."""
    if not re.fullmatch(r"(\(\d+\)[1-9]\d*)*\(\d+\)", layers):
        raise UsageError(
            f"backbone.layers={layers} must be (local)global(local)global...(local), such as (1)2(1)2(1): global counts of at least 1, local layers last"
        )
    return [(int(local), int(far or 0)) for local, far in re.findall(r"\((\d+)\)(\d*)", layers)]
