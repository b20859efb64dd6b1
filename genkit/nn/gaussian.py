"""Continuous latents: an independent Gaussian for every number of the grid, and what tokenizers with such latents have in common.

Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014, appendix B; with a slight pull towards N(0, 1) alone, as the first stage of
latent diffusion: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022, section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.interfaces import Encoded
from genkit.nn.grid_tokenizer import GridTokenizer


@dataclass(frozen=True)
class Gaussian:
    """N(mean, exp(logvar)), both [B, C, *grid] float32."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> Gaussian:
        """moments [B, 2 C, *grid]: means, then logarithms of the variances, which are kept between e^-30 and e^20."""
        mean, logvar = moments.float().chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30, 20))

    def sample(self) -> Tensor:
        """One draw, [B, C, *grid], with torch's global generator, as dropout."""
        return self.mean + torch.exp(0.5 * self.logvar) * torch.randn_like(self.mean)

    def kl(self) -> Tensor:
        """KL(this || N(0, 1)) [B], in nats, summed over the latent."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


class GaussianTokenizer(GridTokenizer):
    """Images [B, image_channels, Y, X] in [-1, 1] <-> z [B, channels, Y / stride, X / stride]; there are no ids.

    A subclass makes `encoder` (to 2 x channels: means and logarithms of variances), `decoder` and `kl_weight`, then calls `finish`.
    """

    num_levels = 0
    codebook_size = 0
    kl_weight: float

    def encode(self, x: Tensor) -> Encoded:
        """x -> z: the mean of the posterior in evaluation mode, a sample of it in training mode (torch's global generator).

        Its loss "kl" [B] is kl_weight times the divergence from N(0, 1) in nats per number of the image. Reconstruction errors are means over
        the same numbers, so that the weight means what it does in the paper, where both are sums.
        """
        self.check_image(x)
        posterior = Gaussian.from_moments(self.encoder(x.contiguous(memory_format=torch.channels_last)))
        z = posterior.sample() if self.training else posterior.mean
        return Encoded(self.scale(z), None, {"kl": self.kl_weight / x[0].numel() * posterior.kl()})

    def codes(self, ids: Tensor) -> NoReturn:
        """Raises UsageError: there are no ids."""
        raise UsageError(
            f"{type(self).__name__} makes continuous latents and has no ids; decode z, or use a tokenizer with codes (vq, ...)"
        )
