"""FSQ: every place becomes a few numbers rounded to a few levels; an id says which. No codebook to learn, none to collapse.

Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple", 2023. Differences: see genkit.nn.scalar; encoder and decoder are those of
genkit.nn.conv.
"""

from __future__ import annotations

from diffusers.configuration_utils import register_to_config

from genkit.nn.conv_tokenizer import ConvTokenizer
from genkit.nn.grid_tokenizer import check_sizes
from genkit.nn.scalar import ScalarQuantizer


class FSQ(ConvTokenizer):
    """Images [B, image_channels, Y, X] in [-1, 1] <-> z [B, channels, Y / stride, X / stride] <-> ids [B, Q, Y / stride, X / stride].

    Args:
        image_channels: 1 grey, 3 colour.
        stride: pixels per token along each axis, a power of two.
        width: channels of the networks on the coarsest grid; finer grids are narrower.
        num_blocks: residual blocks on every grid, in the encoder and again in the decoder.
        levels: how many values each number may take, at least 2; the codebook has their product. [8, 6, 5] is the paper's choice for 2^8 codes,
            [8, 5, 5, 5] for 2^10, [7, 5, 5, 5, 5] for 2^12, [8, 8, 8, 6, 5] for 2^14, [8, 8, 8, 5, 5, 5] for 2^16.
        channels: of z; linear layers lead to the numbers and back where it is not their count. None = their count.
        num_levels: Q, ids per place; from the second on they code what the ones before left over, on finer levels.
        symmetric: levels lie evenly on [-1, 1]; else 0 is always one of them. None = where there must be: a number has 2 levels, or Q > 1.

    Raises: UsageError for a stride that is no power of two, a size below 1 or a level below 2.
    """

    @register_to_config
    def __init__(
        self,
        *,
        image_channels: int,
        stride: int = 4,
        width: int = 128,
        num_blocks: int = 2,
        levels: tuple[int, ...] = (8, 5, 5, 5),
        channels: int | None = None,
        num_levels: int = 1,
        symmetric: bool | None = None,
    ):
        super().__init__()
        channels = len(levels) if channels is None else channels
        check_sizes(channels=channels, num_levels=num_levels)
        is_residual = num_levels > 1
        quantizer = ScalarQuantizer(
            dim=channels,
            levels=levels,
            depth=num_levels,
            is_symmetric=is_residual or min(levels, default=0) == 2 if symmetric is None else symmetric,
            is_clamped=is_residual,
            soft_clamp=[1 + 1 / (n - 1) for n in levels] if is_residual and min(levels) > 1 else None,
        )
        self.build(
            quantizer,
            image_channels=image_channels,
            stride=stride,
            width=width,
            num_blocks=num_blocks,
            channels=channels,
        )
