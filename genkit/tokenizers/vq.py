"""VQ-VAE: images to a grid of ids from one learned codebook and back.

van den Oord et al., "Neural Discrete Representation Learning", 2017. Differences from the paper: encoder and decoder work on coarse grids
(genkit.nn.conv); the codebook is clustered from the first batch and recycles codes that fall out of use (genkit.nn.codebook); optionally
narrow and length-1 codes (Yu et al., "Vector-quantized Image Modeling with Improved VQGAN", 2021, section 3.2).
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from genkit.errors import UsageError
from genkit.interfaces import Encoded
from genkit.nn.conv import Decoder, Encoder
from genkit.nn.quantize import Quantizer


class VQ(ModelMixin, ConfigMixin):
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
        decay: share of the codebook's statistics kept per optimiser step.
        restart: codes used less than this fraction of the mean are replaced by vectors of the batch; 0 = never.

    Raises: UsageError for a stride that is no power of two or a size below 1.
    """

    num_levels = 1

    latent_mean: Tensor  # [channels]
    latent_std: Tensor  # [channels]

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
        decay: float = 0.99,
        restart: float = 0.1,
    ):
        super().__init__()
        if stride < 1 or stride & (stride - 1):
            raise UsageError(f"tokenizer.stride={stride} is not a power of two; use 4, 8 or 16")
        sizes = {
            "width": width,
            "channels": channels,
            "codebook_size": codebook_size,
            "codebook_dim": codebook_dim or 1,
        }
        for name, size in sizes.items():
            if size < 1:
                raise UsageError(f"tokenizer.{name}={size} must be at least 1")
        if not 0 <= decay < 1 or not 0 <= restart < 1:
            raise UsageError(f"tokenizer.decay={decay} and tokenizer.restart={restart} must be in [0, 1)")
        self.image_channels, self.channels, self.stride, self.codebook_size = (
            image_channels,
            channels,
            stride,
            codebook_size,
        )
        shape = {
            "image_channels": image_channels,
            "channels": channels,
            "stride": stride,
            "width": width,
            "num_blocks": num_blocks,
        }
        self.encoder = Encoder(**shape)
        self.quantizer = Quantizer(
            dim=channels,
            codebook_size=codebook_size,
            codebook_dim=codebook_dim,
            cosine=cosine,
            decay=decay,
            restart=restart,
        )
        self.decoder = Decoder(**shape)
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_std", torch.ones(channels))
        # Convolutions on a CPU are faster with channels innermost, and the quantiser's rows are then the memory as it lies.
        self.to(memory_format=torch.channels_last)

    def encode(self, x: Tensor) -> Encoded:
        """x [B, image_channels, Y, X] in [-1, 1] -> z, ids and {"commitment": [B]}.

        Raises: UsageError for another number of channels, or sides that are no multiple of the stride.
        """
        self._check_image(x)
        rows = self.encoder(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)  # [B, Y, X, C]
        found = self.quantizer(rows)
        return Encoded(self._scale(found.codes), found.ids.permute(0, 3, 1, 2), found.losses)

    def decode(self, z: Tensor) -> Tensor:
        """z [B, channels, Y, X] -> images [B, image_channels, stride Y, stride X], not limited to [-1, 1]."""
        rows = z * self.latent_std[:, None, None] + self.latent_mean[:, None, None]
        return self.decoder(rows.contiguous(memory_format=torch.channels_last))

    def codes(self, ids: Tensor) -> Tensor:
        """ids [B, 1, Y, X] int64 -> the z that encode returns with them. Raises UsageError for ids outside the codebook."""
        if ids.ndim != 4 or ids.shape[1] != self.num_levels:
            raise UsageError(f"ids are {list(ids.shape)}, expected [B, 1, Y, X]")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.codebook_size:
            raise UsageError(
                f"ids lie in {int(ids.min())}..{int(ids.max())}, but the codebook has {self.codebook_size} codes, from 0 on"
            )
        return self._scale(self.quantizer.codes(ids.permute(0, 2, 3, 1)))

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

    def _scale(self, codes: Tensor) -> Tensor:
        """Codes as the quantiser makes them [B, Y, X, C] -> z [B, C, Y, X]."""
        return codes.permute(0, 3, 1, 2).sub(self.latent_mean[:, None, None]).div(self.latent_std[:, None, None])

    def _check_image(self, x: Tensor) -> None:
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
