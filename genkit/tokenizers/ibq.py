"""IBQ: a codebook trained by backpropagation through the choice among all its codes.

Shi et al., "Taming Scalable Visual Tokenizer for Autoregressive Image Generation", 2024. Differences: see genkit.nn.index_backprop; encoder and decoder
are those of genkit.nn.conv.
"""

from __future__ import annotations

from diffusers.configuration_utils import register_to_config

from genkit.nn.conv_tokenizer import ConvTokenizer
from genkit.nn.grid_tokenizer import check_sizes
from genkit.nn.index_backprop import IndexBackpropQuantizer


class IBQ(ConvTokenizer):
    """Images [B, image_channels, Y, X] in [-1, 1] <-> z [B, channels, Y / stride, X / stride] <-> ids [B, 1, Y / stride, X / stride].

    Args:
        image_channels: 1 grey, 3 colour.
        stride: pixels per token along each axis, a power of two.
        width: channels of the networks on the coarsest grid; finer grids are narrower.
        num_blocks: residual blocks on every grid, in the encoder and again in the decoder.
        channels: of z.
        codebook_size: number of codes.
        codebook_dim: width of a code where it is to be narrower than z. None = channels.
        beta: weight of the pull of the chosen codes towards their vectors.
        entropy: weight of the entropy loss: that of a vector's assignment is made small, that of the mean assignment large.
        temperature: of the assignment that the entropies are taken of.
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
        beta: float = 0.25,
        entropy: float = 0.05,
        temperature: float = 0.01,
        restart: float = 0.1,
    ):
        super().__init__()
        check_sizes(channels=channels)
        quantizer = IndexBackpropQuantizer(
            dim=channels,
            codebook_size=codebook_size,
            codebook_dim=codebook_dim,
            beta=beta,
            entropy=entropy,
            temperature=temperature,
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
