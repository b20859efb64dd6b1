"""Tokenizers made of the convolutional encoder and decoder of genkit.nn.conv and a quantiser: what they have in common."""

from __future__ import annotations

from typing import Any

from genkit.nn.conv import Decoder, Encoder
from genkit.nn.grid_tokenizer import GridTokenizer, check_sizes


class ConvTokenizer(GridTokenizer):
    """A subclass's constructor makes its quantiser and hands it to `build`."""

    def build(
        self, quantizer: Any, *, image_channels: int, stride: int, width: int, num_blocks: int, channels: int
    ) -> None:
        """Make the networks around a quantiser, a module as GridTokenizer wants it with num_levels and codebook_size; arguments as genkit.nn.conv."""
        check_sizes(stride=stride, width=width, channels=channels)
        self.image_channels, self.channels, self.stride = image_channels, channels, stride
        self.num_levels, self.codebook_size = quantizer.num_levels, quantizer.codebook_size
        shape = {
            "image_channels": image_channels,
            "channels": channels,
            "stride": stride,
            "width": width,
            "num_blocks": num_blocks,
        }
        self.encoder = Encoder(**shape)
        self.quantizer = quantizer
        self.decoder = Decoder(**shape)
        self.finish()
