"""No tokenizer: generators of pixels. Nothing to train; a generator's recipe says `tokenizer: {type: pixels}`."""

from __future__ import annotations

from typing import NoReturn

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from genkit.errors import UsageError
from genkit.interfaces import Encoded


class Pixels(ModelMixin, ConfigMixin):
    """Images [B, image_channels, Y, X] in [-1, 1] <-> z, the same numbers.

    Args:
        image_channels: 1 grey, 3 colour.
    """

    is_trained = False  # a recipe may name it where others name a run
    stride = 1
    num_levels = 0
    codebook_size = 0

    @register_to_config
    def __init__(self, *, image_channels: int):
        super().__init__()
        self.channels = image_channels

    def encode(self, x: Tensor) -> Encoded:
        """z = x."""
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise UsageError(f"images are {list(x.shape)}, but this generator was made for [B, {self.channels}, Y, X]")
        return Encoded(x, None)

    def decode(self, z: Tensor) -> Tensor:
        """x = z."""
        return z

    def codes(self, ids: Tensor) -> NoReturn:
        """Raises UsageError: there are no ids."""
        raise UsageError("pixels have no ids; use a tokenizer with codes (vq, ...)")
