"""A vision transformer that writes an image into a few tokens, and one that reads it back.

Yu et al., "An Image is Worth 32 Tokens for Reconstruction and Generation" (TiTok), NeurIPS 2024, section 3.2; behaviour as in bytedance/1d-tokenizer
modeling/modules/blocks.py, so that its weights fit.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.nn.mlp import MLP


class Block(nn.Module):
    """Attention and perceptron, each after a layer norm and beside a residual path, [B, N, D] -> the same."""

    def __init__(self, *, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim=dim, mlp_ratio=4.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b n (three h k) -> three b h n k", three=3, h=self.num_heads)
        x = x + self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n k -> b n (h k)"))
        return x + self.mlp(self.norm2(x))


class _Transformer(nn.Module):
    """What both directions share: [a class token, P patches, K latent tokens] with learned positions through a stack of blocks."""

    def __init__(self, *, dim: int, depth: int, num_heads: int, num_patches: int, num_tokens: int):
        super().__init__()
        self.num_patches = num_patches
        std = dim**-0.5
        self.class_token = nn.Parameter(std * torch.randn(1, dim))
        self.patch_positions = nn.Parameter(std * torch.randn(1 + num_patches, dim))  # the class token's first
        self.token_positions = nn.Parameter(std * torch.randn(num_tokens, dim))
        self.norm_in = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(Block(dim=dim, num_heads=num_heads) for _ in range(depth))
        self.norm_out = nn.LayerNorm(dim)

    def run(self, patches: Tensor, tokens: Tensor) -> Tensor:
        """patches [B, P, D], tokens [B, K, D] -> [B, 1 + P + K, D], before the last norm."""
        patches = torch.cat([self.class_token.expand(len(patches), 1, -1), patches], dim=1) + self.patch_positions
        x = self.norm_in(torch.cat([patches, tokens + self.token_positions], dim=1))
        for block in self.blocks:
            x = block(x)
        return x

    def init_linears(self) -> None:
        """Weights that keep the variance of what they are given, and no biases. At the widths of the paper that is about its 0.02; at that of a toy
        0.02 would leave the tokens nearly the same for all images, and the codebook nothing to tell apart."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                bias = module.bias
                if bias is not None:
                    nn.init.zeros_(bias)


class TokenEncoder(_Transformer):
    """Images [B, image_channels, P side, P side] -> [B, channels, K].

    Args:
        grid: patches along each side.
        patch_size: pixels along each side of a patch.
        is_legacy: memory of the tokens [K, D] is read as [D, K] before the projection to `channels`. The first released weights were trained with
            this slip of the axes; it costs nothing to keep, because K D -> channels K is learned anyway.
    """

    def __init__(
        self,
        *,
        image_channels: int,
        channels: int,
        grid: int,
        patch_size: int,
        num_tokens: int,
        dim: int,
        depth: int,
        num_heads: int,
        is_legacy: bool,
    ):
        super().__init__(dim=dim, depth=depth, num_heads=num_heads, num_patches=grid**2, num_tokens=num_tokens)
        self.is_legacy = is_legacy
        self.embed = nn.Conv2d(image_channels, dim, patch_size, stride=patch_size)
        self.project = nn.Linear(dim, channels)
        self.init_linears()
        self.tokens = nn.Parameter(dim**-0.5 * torch.randn(num_tokens, dim))

    def forward(self, x: Tensor) -> Tensor:
        patches = self.embed(x).flatten(2).mT  # [B, P, D]
        tokens = self.run(patches, self.tokens.expand(len(x), -1, -1))[:, 1 + self.num_patches :]
        tokens = self.norm_out(tokens)  # [B, K, D]
        if self.is_legacy:
            tokens = tokens.reshape(len(x), tokens.shape[2], tokens.shape[1]).mT
        return self.project(tokens).mT  # [B, channels, K]


class TokenDecoder(_Transformer):
    """[B, channels, K] -> one vector per patch, [B, D, grid, grid]."""

    def __init__(self, *, channels: int, grid: int, num_tokens: int, dim: int, depth: int, num_heads: int):
        super().__init__(dim=dim, depth=depth, num_heads=num_heads, num_patches=grid**2, num_tokens=num_tokens)
        self.grid = grid
        self.embed = nn.Linear(channels, dim)
        self.init_linears()
        self.mask_token = nn.Parameter(dim**-0.5 * torch.randn(1, 1, dim))

    def forward(self, z: Tensor) -> Tensor:
        patches = self.mask_token.expand(len(z), self.num_patches, -1)
        patches = self.run(patches, self.embed(z.mT))[:, 1 : 1 + self.num_patches]
        return rearrange(self.norm_out(patches), "b (y x) d -> b d y x", y=self.grid)


class PatchPixels(nn.Module):
    """[B, D, grid, grid] -> images [B, image_channels, patch_size grid, patch_size grid]: pixels of each patch, then a 3x3 convolution over the seams."""

    def __init__(self, *, dim: int, image_channels: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.pixels = nn.Conv2d(dim, patch_size**2 * image_channels, 1)
        self.smooth = nn.Conv2d(image_channels, image_channels, 3, padding=1)
        # It starts as the identity: noise in the one layer that touches pixels would have to be unlearned first.
        nn.init.dirac_(self.smooth.weight)
        assert self.smooth.bias is not None
        nn.init.zeros_(self.smooth.bias)

    def forward(self, x: Tensor) -> Tensor:
        p = self.patch_size
        return self.smooth(rearrange(self.pixels(x), "b (p1 p2 c) y x -> b c (y p1) (x p2)", p1=p, p2=p))


class ProxyLogits(nn.Module):
    """[B, D, grid, grid] -> logits [B, num_codes, grid, grid] over the codes of another tokenizer's grid."""

    def __init__(self, *, dim: int, num_codes: int):
        super().__init__()
        self.up = nn.Conv2d(dim, 2 * dim, 1)
        self.down = nn.Conv2d(2 * dim, num_codes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))
