"""Frequency-guided residual VQ: an image as ids on growing grids, of which the first hold its low frequencies and the last its texture.

Huang et al., "NFIG: Autoregressive Image Generation with Next-Frequency Prediction", 2025, section 3.2. The authors' code was not to be had: what the
paper leaves open is chosen here - bands reach to the corner of the spectrum (genkit.nn.frequency), means over areas shrink and bicubic
interpolation enlarges as in VAR, no convolutions after the look-up, 4,096 codes of width 32 at paper scale - and the encoder is not initialised from DINOv2.
"""

from __future__ import annotations

from diffusers.configuration_utils import register_to_config

from genkit.nn.multiscale import ScaleQuantizer
from genkit.nn.scale_tokenizer import ScaleTokenizer
from genkit.nn.straight_through import Gradient


class NFIG(ScaleTokenizer):
    """Images [B, image_channels, P, P] in [-1, 1] <-> z [B, channels, p, p] <-> ids [B, 1, N]; P = stride p, p the last of `patch_sizes`.

    Scale k codes frequency band k of the features and what the scales before it could not represent of theirs.

    Args:
        image_channels: 1 grey, 3 colour.
        patch_sizes: side of the grid of every scale, rising; N is the sum of their squares, and the width of a band is in proportion to its square.
        stride: pixels per cell of the finest grid along each axis, a power of two.
        width: channels of the light networks on the coarsest grid.
        num_blocks: residual blocks on every grid.
        widths: instead of `width`, channels of every level of deep networks as in VAR, finest first, multiples of 32.
        channels: of z, the width of a code.
        codebook_size: number of codes, one table for all scales.
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
        channels: int = 32,
        codebook_size: int = 512,
        gradient: Gradient = "straight_through",
        decay: float = 0.99,
        restart: float = 0.1,
    ):
        super().__init__()
        quantizer = ScaleQuantizer(
            dim=channels,
            codebook_size=codebook_size,
            patch_sizes=patch_sizes,
            phi_ratio=0.0,
            by_frequency=True,
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
            quantizer=quantizer,
        )
