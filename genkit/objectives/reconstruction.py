"""Trains a tokenizer to give back what it was shown (van den Oord et al., "Neural Discrete Representation Learning", 2017, eq. 3).

Differences from the paper: absolute errors beside squared ones, because they keep edges sharper; no codebook term, because the codebook
follows its assignments (genkit.nn.codebook). Optionally a perceptual loss (Zhang et al., CVPR 2018; Esser et al., CVPR 2021, section 3.1).
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from genkit.errors import GenkitError, UsageError
from genkit.interfaces import Cond, Encoded, Layout
from genkit.metrics import emoji_net, fashion_net
from genkit.metrics import features as nets
from genkit.metrics.reconstruction import decibels
from genkit.nn import lpips
from genkit.nn.perceptual import FeatureDistance
from genkit.rng import Rng


class Reconstruction:
    """Weighted means over the pixels of each image, plus what the tokenizer reports of itself.

    Args:
        l1: weight of the absolute error.
        l2: weight of the squared error.
        commitment: weight of the squared distance between vectors and their codes; 0.25 in the paper.
        perceptual: weight of a distance between features of image and reconstruction; 0 = off. 1 is VQGAN's.
        features: whose features: "lpips", or "fashion-cnn" (28x28 grey) or "emoji-cnn" (small square RGB), which come with the package; "auto" is LPIPS
            where its weights are at hand, else the one of these two that takes the images. The loss is logged under a name that says which.
            A Fréchet distance by the same features is then no independent judge.
    """

    target = "x"  # what of the data it learns

    def __init__(
        self,
        *,
        l1: float = 1.0,
        l2: float = 1.0,
        commitment: float = 0.25,
        perceptual: float = 0.0,
        features: str = "auto",
    ):
        self.weights = {"l1": l1, "l2": l2, "commitment": commitment}
        self.perceptual, self.features = perceptual, features
        self.look: Any = None  # images, images -> [B]
        self.look_name = ""

    def prepare(self, shape: tuple[int, ...], device: torch.device | str) -> None:
        """Load what it compares images with, for images of this shape (C, Y, X). Called once, before the first batch.

        Raises: UsageError for features that cannot take the images; GenkitError for weights that are missing.
        """
        if self.perceptual:
            name, self.look = perceptual_distance(self.features, shape)
            self.look.to(device)
            self.look_name = f"perceptual_{name.replace('-', '_')}"

    def __call__(self, model: Any, target: Tensor, cond: Cond, layout: Layout | None, rng: Rng) -> dict[str, Tensor]:
        """{"l1", "l2", "perceptual_NET" where it is on, a name for each loss of the tokenizer, "_psnr": each [B]} for images target [B, C, *grid] in [-1, 1].

        A loss of the tokenizer whose weight is not an option here enters with weight 1. "_psnr" is in dB and not a loss.
        """
        reconstruction, encoded = model(target)
        return self.compare(reconstruction, target) | self.of_tokenizer(encoded)

    def compare(self, reconstruction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """What is wrong with the pixels: "l1", "l2", "perceptual_NET" and "_psnr", weighted, [B] each."""
        error = (reconstruction - target).float().flatten(1)  # [B, C * pixels]
        l1, l2 = error.abs().mean(1), error.square().mean(1)
        losses = {"l1": self.weights["l1"] * l1, "l2": self.weights["l2"] * l2}
        if self.perceptual:
            if self.look is None:
                self.prepare(tuple(target.shape[1:]), target.device)
            with torch.autocast(target.device.type, enabled=False):
                losses[self.look_name] = self.perceptual * self.look(reconstruction.float(), target.float())
        return losses | {"_psnr": decibels(l2.detach())}

    def of_tokenizer(self, encoded: Encoded) -> dict[str, Tensor]:
        """The tokenizer's own losses, weighted, [B] each."""
        return {name: self.weights.get(name, 1.0) * value for name, value in encoded.losses.items()}

    def predictor(self, model: Any, cond: Cond, layout: Layout) -> NoReturn:
        """A tokenizer makes nothing new. Raises GenkitError."""
        raise GenkitError(
            "a tokenizer is not sampled; train a generator on its tokens, or use `genkit encode` and `genkit decode`"
        )


def perceptual_distance(features: str, shape: tuple[int, ...]) -> tuple[str, Any]:
    """(name, module comparing images of shape (C, Y, X): images, images -> [B]). Raises UsageError for features that cannot take them."""
    takes = {"fashion-cnn": fashion_net.takes, "emoji-cnn": emoji_net.takes}
    fitting = [name for name, takes_shape in takes.items() if takes_shape(shape)]
    if features == "auto":
        if not lpips.is_available() and not fitting:
            raise UsageError(
                f"no features for a perceptual loss of images {list(shape)}: the weights of LPIPS are not at hand "
                f"({lpips.TRUNK.name} and {lpips.HEADS.name}); put them into a folder and set GENKIT_WEIGHTS, or set objective.perceptual=0"
            )
        features = "lpips" if lpips.is_available() else fitting[0]
    if features == "lpips":
        return "lpips", lpips.load_lpips()
    if features not in takes:
        raise UsageError(f"objective.features={features}: choose auto, lpips, {' or '.join(takes)}")
    if features not in fitting:
        raise UsageError(
            f"objective.features={features} does not take images {list(shape)}; {' or '.join(fitting) or 'lpips'} does"
        )
    net = nets.load(features)
    side = emoji_net.SIDE if features == "emoji-cnn" else None
    return net.protocol, FeatureDistance(net.module.body, side)
