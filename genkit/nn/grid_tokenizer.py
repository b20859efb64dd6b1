"""What tokenizers of a grid of tokens have in common: checks, scaling of latents, images to vectors to codes and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor, nn

from genkit.errors import UsageError
from genkit.interfaces import Encoded


class GridTokenizer(ModelMixin, ConfigMixin):
    """Images [B, image_channels, Y, X] in [-1, 1] <-> z [B, channels, Y / stride, X / stride] <-> ids [B, Q, Y / stride, X / stride].

    A subclass makes `encoder` and `decoder` (nn.Module, images <-> [B, channels, Y / stride, X / stride]) and `quantizer`, a module with
    forward(rows [B, *grid, channels]) -> Quantized and codes(ids [B, *grid, Q]) -> [B, *grid, channels]; then it calls `finish`.

    Attributes:
        latent_mean, latent_std: [channels]; z = (codes - latent_mean) / latent_std, so that z has unit variance (see set_latent_stats).
    """

    image_channels: int
    channels: int
    stride: int
    num_levels: int
    codebook_size: int
    encoder: Any
    decoder: Any
    quantizer: Any
    latent_mean: Tensor
    latent_std: Tensor

    def finish(self) -> None:
        """The last line of a subclass's constructor."""
        self.register_buffer("latent_mean", torch.zeros(self.channels))
        self.register_buffer("latent_std", torch.ones(self.channels))
        # Convolutions on a CPU are faster with channels innermost, and the quantiser's rows are then the memory as it lies.
        self.to(memory_format=torch.channels_last)

    @property
    def last_layer(self) -> Tensor:
        """The weight whose products are the pixels: where adversarial training compares gradients."""
        return [module.weight for module in self.decoder.modules() if isinstance(module, nn.Conv2d)][-1]

    def encode(self, x: Tensor) -> Encoded:
        """x [B, image_channels, Y, X] in [-1, 1] -> z, ids and the quantiser's losses, [B] each.

        Raises: UsageError for another number of channels, or sides that are no multiple of the stride.
        """
        self.check_image(x)
        rows = self.encoder(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)  # [B, Y, X, C]
        found = self.quantizer(rows)
        return Encoded(self.scale(found.codes.permute(0, 3, 1, 2)), found.ids.permute(0, 3, 1, 2), found.losses)

    def decode(self, z: Tensor) -> Tensor:
        """z [B, channels, Y, X] -> images [B, image_channels, stride Y, stride X], not limited to [-1, 1]."""
        return self.decoder(self.unscale(z).contiguous(memory_format=torch.channels_last))

    def codes(self, ids: Tensor) -> Tensor:
        """ids [B, Q, Y, X] int64 -> the z that encode returns with them. Raises UsageError for ids outside the codebook."""
        self.check_ids(ids)
        return self.scale(self.quantizer.codes(ids.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Encoded]:
        """x -> (its reconstruction, what it was encoded to)."""
        encoded = self.encode(x)
        return self.decode(encoded.z), encoded

    @torch.no_grad()
    def set_latent_stats(self, mean: Tensor, std: Tensor) -> None:
        """Make z = (codes - mean) / std from now on, with mean and std [channels] measured on the codes of training images.

        A z made before is not understood afterwards. Raises UsageError for statistics that cannot be divided by.
        """
        if mean.shape != self.latent_mean.shape or std.shape != self.latent_std.shape:
            raise UsageError(
                f"latent statistics are {list(mean.shape)} and {list(std.shape)}, expected [{self.channels}]"
            )
        if not bool((torch.isfinite(mean) & torch.isfinite(std) & (std > 0)).all()):
            raise UsageError("latent statistics must be finite, with every std above 0")
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    @torch.no_grad()
    def reset_latent_stats(self) -> None:
        """Leave latents as they are from now on: z = codes."""
        self.latent_mean.zero_()
        self.latent_std.fill_(1)

    def scale(self, codes: Tensor) -> Tensor:
        """Codes [B, channels, *grid] -> z of the same shape."""
        return codes.sub(self._along(self.latent_mean, codes)).div(self._along(self.latent_std, codes))

    def unscale(self, z: Tensor) -> Tensor:
        """The inverse of `scale`."""
        return z * self._along(self.latent_std, z) + self._along(self.latent_mean, z)

    def check_image(self, x: Tensor) -> None:
        """Raises UsageError for another number of channels, or sides that are no multiple of the stride (says which would fit)."""
        if x.ndim != 4 or x.shape[1] != self.image_channels:
            raise UsageError(
                f"images are {list(x.shape)}, but this tokenizer was made for [B, {self.image_channels}, Y, X]"
            )
        if any(side % self.stride or not side for side in x.shape[2:]):
            Y, X = x.shape[2:]
            larger = [-(-side // self.stride) * self.stride for side in (Y, X)]
            smaller = [side // self.stride * self.stride for side in (Y, X)]
            fits = " or ".join(f"{y}x{x}" for y, x in (smaller, larger) if y and x)
            raise UsageError(f"images of {Y}x{X} do not fit stride {self.stride}; nearest sizes that do: {fits}")

    def check_ids(self, ids: Tensor) -> None:
        """Raises UsageError for ids of another shape than [B, num_levels, Y, X], or outside the codebook."""
        if ids.ndim != 4 or ids.shape[1] != self.num_levels:
            raise UsageError(f"ids are {list(ids.shape)}, expected [B, {self.num_levels}, Y, X]")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.codebook_size:
            raise UsageError(
                f"ids lie in {int(ids.min())}..{int(ids.max())}, but the codebook has {self.codebook_size} codes, from 0 on"
            )

    @staticmethod
    def _along(values: Tensor, like: Tensor) -> Tensor:
        """[channels] -> [channels, 1, ...] against [B, channels, *grid]."""
        return values.view(-1, *[1] * (like.ndim - 2))


def latent_grid(tokenizer: Any, grid: Sequence[int]) -> tuple[int, ...]:
    """Cells of z along each axis, where ids lie on this grid: the same but for ids of several scales."""
    return getattr(tokenizer, "latent_grid", tuple(grid))


def image_sides(tokenizer: Any, grid: Sequence[int]) -> list[int]:
    """Pixels along each axis of images with tokens on this grid; where they lie in a row, of the only images that such a tokenizer knows."""
    if len(grid) == 1 and hasattr(tokenizer, "image_size"):
        return [tokenizer.image_size] * 2
    return [length * tokenizer.stride for length in grid]


def check_sizes(**sizes: int) -> None:
    """Raises UsageError for a constructor argument below 1, and for a `stride` that is no power of two."""
    stride = sizes.get("stride", 1)
    if stride < 1 or stride & (stride - 1):
        raise UsageError(f"tokenizer.stride={stride} is not a power of two; use 4, 8 or 16")
    for name, size in sizes.items():
        if size < 1:
            raise UsageError(f"tokenizer.{name}={size} must be at least 1")
