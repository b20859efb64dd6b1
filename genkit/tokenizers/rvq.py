"""Residual VQ: several ids per place, each coding what the ones before it left over.

Zeghidour et al., "SoundStream: An End-to-End Neural Audio Codec", 2021, section III.C; Lee et al., "Autoregressive Image Generation using Residual
Quantization" (RQ-VAE), 2022. With groups: Yang et al., "HiFi-Codec: Group-residual Vector quantization for High Fidelity Audio Codec", 2023.
Differences: see genkit.nn.quantize and genkit.tokenizers.vq.
"""

from __future__ import annotations

from diffusers.configuration_utils import register_to_config
from torch import Tensor

from genkit.errors import UsageError
from genkit.nn.codebook import Update
from genkit.nn.conv_tokenizer import ConvTokenizer
from genkit.nn.grid_tokenizer import check_sizes
from genkit.nn.quantize import Quantizer
from genkit.nn.straight_through import Gradient


class RVQ(ConvTokenizer):
    """Images [B, image_channels, Y, X] in [-1, 1] <-> z [B, channels, Y / stride, X / stride] <-> ids [B, Q, Y / stride, X / stride].

    The first ids of a place are the coarsest. A tokenizer trained with min_levels also reads ids of -1, "nothing": fewer levels, a lower rate.

    Args:
        image_channels: 1 grey, 3 colour.
        stride: pixels per token along each axis, a power of two.
        width: channels of the networks on the coarsest grid; finer grids are narrower.
        num_blocks: residual blocks on every grid, in the encoder and again in the decoder.
        channels: of z.
        codebook_size: number of codes of a level.
        num_levels: Q, ids per place.
        num_groups: z is cut into as many slices, each with num_levels / num_groups ids; a level of all groups follows another.
        codebook_dim: width of a code where it is to be narrower than its slice of z. None = channels / num_groups.
        cosine: codes have length 1 and the direction of what they code is compared.
        is_shared: all levels use one codebook (one per group).
        min_levels: every training batch is coded with a random number of levels from this one on, so that the first ids alone say as much as they
            can. A multiple of num_groups. None = always all.
        gradient, update, decay, restart: see genkit.tokenizers.vq.

    Raises: UsageError for a stride that is no power of two, a size below 1, or numbers that do not divide.
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
        num_levels: int = 4,
        num_groups: int = 1,
        codebook_dim: int | None = None,
        cosine: bool = False,
        is_shared: bool = False,
        min_levels: int | None = None,
        gradient: Gradient = "straight_through",
        update: Update = "ema",
        decay: float = 0.99,
        restart: float = 0.1,
    ):
        super().__init__()
        check_sizes(channels=channels, num_levels=num_levels, num_groups=num_groups)
        for name, number in (("channels", channels), ("num_levels", num_levels), ("min_levels", min_levels or 0)):
            if number % num_groups:
                raise UsageError(f"tokenizer.{name}={number} is no multiple of tokenizer.num_groups={num_groups}")
        if min_levels is not None and not 1 <= min_levels <= num_levels:
            raise UsageError(f"tokenizer.min_levels={min_levels} must be in 1..{num_levels}, tokenizer.num_levels")
        quantizer = Quantizer(
            dim=channels,
            codebook_size=codebook_size,
            codebook_dim=channels // num_groups if codebook_dim is None else codebook_dim,
            num_heads=num_groups,
            depth=num_levels // num_groups,
            is_shared_by_levels=is_shared,
            min_depth=None if min_levels is None else min_levels // num_groups,
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

    def check_ids(self, ids: Tensor) -> None:
        """As every tokenizer, and -1 is allowed where training left levels out."""
        super().check_ids(ids if self.quantizer.min_depth is None else ids.masked_fill(ids == -1, 0))
