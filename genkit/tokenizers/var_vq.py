"""Multi-scale residual VQ: an image as ids on grids that grow from one cell to the whole, for generators that predict scale after scale.

Tian et al., "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction" (VAR), NeurIPS 2024, section 3.2; official weights
are read by `genkit import`. Differences from the paper: see genkit.nn.multiscale; without `widths` the networks are the light ones of genkit.nn.conv.
"""

from __future__ import annotations

from diffusers.configuration_utils import register_to_config

from genkit.nn.multiscale import ScaleQuantizer
from genkit.nn.scale_tokenizer import ScaleTokenizer
from genkit.nn.straight_through import Gradient


class VarVq(ScaleTokenizer):
    """Images [B, image_channels, P, P] in [-1, 1] <-> z [B, channels, p, p] <-> ids [B, 1, N]; P = stride p, p the last of `patch_sizes`.

    Args:
        image_channels: 1 grey, 3 colour.
        patch_sizes: side of the grid of every scale, rising; N is the sum of their squares.
        stride: pixels per cell of the finest grid along each axis, a power of two.
        width: channels of the light networks on the coarsest grid.
        num_blocks: residual blocks on every grid.
        widths: instead of `width`, channels of every level of VAR's own networks, finest first, multiples of 32.
        stem: with `widths`, channels of the encoder's first convolution; null = the first of them.
        latent_kernel: with `widths`, size of the convolutions between networks and quantiser.
        channels: of z, the width of a code.
        codebook_size: number of codes, one table for all scales.
        num_phi: convolutions after the look-up, each shared by neighbouring scales.
        phi_ratio: share of these convolutions in what a scale adds; 0 = none.
        cosine: a code is chosen by direction alone and added with its own length.
        gradient: see genkit.tokenizers.vq.
        decay, restart: see genkit.nn.codebook.Codebook.

    Raises: UsageError for sizes that do not fit each other.
    """

    @register_to_config
    def __init__(
        self,
        *,
        image_channels: int,
        patch_sizes: tuple[int, ...] = (1, 2, 3, 4, 6, 8),
        stride: int = 4,
        width: int = 128,
        num_blocks: int = 2,
        widths: tuple[int, ...] | None = None,
        stem: int | None = None,
        latent_kernel: int = 3,
        channels: int = 32,
        codebook_size: int = 512,
        num_phi: int = 4,
        phi_ratio: float = 0.5,
        cosine: bool = False,
        gradient: Gradient = "straight_through",
        decay: float = 0.99,
        restart: float = 0.1,
    ):
        super().__init__()
        quantizer = ScaleQuantizer(
            dim=channels,
            codebook_size=codebook_size,
            patch_sizes=patch_sizes,
            num_phi=num_phi,
            phi_ratio=phi_ratio,
            cosine=cosine,
            gradient=gradient,
            decay=decay,
            restart=restart,
        )
        self.build(
            image_channels=image_channels,
            channels=channels,
            stride=stride,
            width=width,
            num_blocks=num_blocks,
            widths=widths,
            latent_kernel=latent_kernel,
            stem=stem,
            quantizer=quantizer,
        )
