"""LFQ: the signs of a few channels are the bits of an id; an entropy keeps all codes in use.

Yu et al., "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation" (MAGVIT-v2), 2023, section 3.1. Differences: see genkit.nn.binary;
encoder and decoder are those of genkit.nn.conv.
"""

from __future__ import annotations

from diffusers.configuration_utils import register_to_config

from genkit.nn.binary import BinaryQuantizer, BitOrder
from genkit.nn.conv_tokenizer import ConvTokenizer
from genkit.nn.grid_tokenizer import check_sizes


class LFQ(ConvTokenizer):
    """Images [B, image_channels, Y, X] in [-1, 1] <-> z [B, channels, Y / stride, X / stride] <-> ids [B, Q, Y / stride, X / stride].

    Args:
        image_channels: 1 grey, 3 colour.
        stride: pixels per token along each axis, a power of two.
        width: channels of the networks on the coarsest grid; finer grids are narrower.
        num_blocks: residual blocks on every grid, in the encoder and again in the decoder.
        codebook_size: number of codes, a power of two.
        channels: of z; linear layers lead to the bits and back where it is not their count. None = their count.
        num_levels: Q, ids per place; from the second on they code what the ones before left over, with half their length.
        entropy: weight of the entropy loss: that of a vector's assignment is made small, that of the mean assignment large.
        diversity: weight of the mean assignment within it.
        temperature: of the soft assignment; small next to 4 times the vectors makes it hard, and the entropies blind.
        group_bits: most bits whose joint use is made even, 1 to 18; exact where it is the number of bits.
        bit_order: "big": the first channel is the highest bit of the id; "little": the lowest.

    Raises: UsageError for a codebook_size or stride that is no power of two, or a size below 1.
    """

    @register_to_config
    def __init__(
        self,
        *,
        image_channels: int,
        stride: int = 4,
        width: int = 128,
        num_blocks: int = 2,
        codebook_size: int = 512,
        channels: int | None = None,
        num_levels: int = 1,
        entropy: float = 0.1,
        diversity: float = 1.0,
        temperature: float = 0.01,
        group_bits: int = 18,
        bit_order: BitOrder = "big",
    ):
        super().__init__()
        channels = max(1, codebook_size.bit_length() - 1) if channels is None else channels
        check_sizes(channels=channels, num_levels=num_levels)
        quantizer = BinaryQuantizer(
            dim=channels,
            codebook_size=codebook_size,
            depth=num_levels,
            bit_order=bit_order,
            entropy=entropy,
            diversity=diversity,
            temperature=temperature,
            group_bits=group_bits,
        )
        self.build(
            quantizer,
            image_channels=image_channels,
            stride=stride,
            width=width,
            num_blocks=num_blocks,
            channels=channels,
        )
