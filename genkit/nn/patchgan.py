"""PatchGAN: a network that judges every patch of an image by itself.

Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", CVPR 2017, section 3.2 and appendix 6.1.2, as used by VQGAN (Esser et
al., CVPR 2021). Difference: group norms instead of batch norms. An image's judgement then depends on no other image, so that neither micro-batches nor
processes change it.
"""

from __future__ import annotations

from torch import Tensor, nn

from genkit.errors import UsageError

_SLOPE = 0.2  # of the leaky ReLU


class PatchDiscriminator(nn.Module):
    """Images [B, image_channels, Y, X] -> logits [B, 1, y, x], each of a patch of 70x70 pixels with three halvings, 34x34 with two, 16x16 with one.

    Args:
        width: channels after the first convolution; each halving doubles them, up to eight times as many.
        depth: halvings.
    """

    def __init__(self, *, image_channels: int, width: int = 64, depth: int = 3):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(image_channels, width, 4, 2, 1), nn.LeakyReLU(_SLOPE)]
        before = width
        for level in range(1, depth + 1):
            dim = width * min(2**level, 8)
            stride = 2 if level < depth else 1
            layers.append(nn.Conv2d(before, dim, 4, stride, 1, bias=False))
            layers += [nn.GroupNorm(max(1, dim // 16), dim), nn.LeakyReLU(_SLOPE)]
            before = dim
        layers.append(nn.Conv2d(before, 1, 4, 1, 1))
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def check_sides(sides: tuple[int, ...], depth: int) -> None:
    """Raises UsageError for images that have no patch left after `depth` halvings and two convolutions without padding of their own."""
    least = 3 * 2**depth
    if min(sides) < least:
        raise UsageError(
            f"images of {sides[0]}x{sides[1]} are too small for a discriminator with objective.depth={depth} halvings, which needs {least} pixels; "
            "use a smaller depth"
        )
