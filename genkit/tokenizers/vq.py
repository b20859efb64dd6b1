"""VQ-VAE: images to a grid of ids from one learned codebook and back.

van den Oord et al., "Neural Discrete Representation Learning", 2017. Differences from the paper: encoder and decoder work on coarse grids
(genkit.nn.conv); the codebook is clustered from the first batch and recycles codes that fall out of use (genkit.nn.codebook); optionally
narrow and length-1 codes (Yu et al., "Vector-quantized Image Modeling with Improved VQGAN", 2021, section 3.2).
"""

from __future__ import annotations

from diffusers.configuration_utils import register_to_config

from genkit.nn.codebook import Update
from genkit.nn.conv_tokenizer import ConvTokenizer
from genkit.nn.grid_tokenizer import check_sizes
from genkit.nn.quantize import Quantizer
from genkit.nn.straight_through import Gradient


class VQ(ConvTokenizer):
    """Images [B, image_channels, Y, X] in [-1, 1] <-> z [B, channels, Y / stride, X / stride] <-> ids [B, 1, Y / stride, X / stride].

    Args:
        image_channels: 1 grey, 3 colour.
        stride: pixels per token along each axis, a power of two.
        width: channels of the networks on the coarsest grid; finer grids are narrower.
        num_blocks: residual blocks on every grid, in the encoder and again in the decoder.
        channels: of z.
        codebook_size: number of codes.
        codebook_dim: width of a code where it is to be narrower than z; 8 to 32 with `cosine` is usual. None = channels.
        cosine: codes and what is compared with them have length 1.
        gradient: how the gradient passes the look-up: "straight_through" unchanged, "rotation" turned from the code to the vector.
        update: codes follow the vectors assigned to them ("ema") or are trained with the networks ("gradient").
        decay: share of the codebook's statistics kept per optimiser step.
        restart: codes used less than this fraction of the mean are replaced by vectors of the batch; 0 = never.

    Raises: UsageError for a stride that is no power of two or a size below 1.
    """

    @register_to_config
    def __init__(
        self,
        *,
        image_channels: int,
        stride: int = 4,
        width: int = 128,
        num_blocks: int = 2,
        channels: int = 32,
        codebook_size: int = 512,
        codebook_dim: int | None = None,
        cosine: bool = False,
        gradient: Gradient = "straight_through",
        update: Update = "ema",
        decay: float = 0.99,
        restart: float = 0.1,
    ):
        super().__init__()
        check_sizes(channels=channels)
        quantizer = Quantizer(
            dim=channels,
            codebook_size=codebook_size,
            codebook_dim=codebook_dim,
            cosine=cosine,
            gradient=gradient,
            update=update,
            decay=decay,
            restart=restart,
        )
        self.build(
            quantizer,
            image_channels=image_channels,
            stride=stride,
            width=width,
            num_blocks=num_blocks,
            channels=channels,
        )
