"""No tokenizer: generators of pixels. Nothing to train; a generator's recipe says `tokenizer: {type: pixels}`."""

from __future__ import annotations

from typing import NoReturn

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from genkit.errors import UsageError
from genkit.interfaces import Encoded


class Pixels(ModelMixin, ConfigMixin):
    """Images [B, image_channels, Y, X] in [-1, 1] <-> z = x / std.

    Args:
        image_channels: 1 grey, 3 colour.
        std: standard deviation of the pixels, about 0.5 of photographs, so that z has one of about 1.
    """

    is_trained = False  # a recipe may name it where others name a run
    stride = 1
    num_levels = 0
    codebook_size = 0

    @register_to_config
    def __init__(self, *, image_channels: int, std: float = 0.5):
        super().__init__()
        if std <= 0:
            raise UsageError(f"tokenizer.std={std} must be positive")
        self.channels = image_channels
        self.pixel_std = nn.Parameter(torch.tensor(std), requires_grad=False)

    def encode(self, x: Tensor) -> Encoded:
        """z = x / std."""
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise UsageError(f"images are {list(x.shape)}, but this generator was made for [B, {self.channels}, Y, X]")
        return Encoded(x / self.pixel_std, None)

    def decode(self, z: Tensor) -> Tensor:
        """x = std z."""
        return z * self.pixel_std

    def codes(self, ids: Tensor) -> NoReturn:
        """Raises UsageError: there are no ids."""
        raise UsageError("pixels have no ids; use a tokenizer with codes (vq, ...)")
