"""Trains a tokenizer to give back what it was shown (van den Oord et al., "Neural Discrete Representation Learning", 2017, eq. 3).

Differences from the paper: absolute errors beside squared ones, because they keep edges sharper; no codebook term, because the codebook
follows its assignments (genkit.nn.codebook).
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from genkit.errors import GenkitError
from genkit.interfaces import Cond, Layout
from genkit.rng import Rng


class Reconstruction:
    """Weighted means over the pixels of each image, plus what the tokenizer reports of itself.

    Args:
        l1: weight of the absolute error.
        l2: weight of the squared error.
        commitment: weight of the squared distance between vectors and their codes; 0.25 in the paper.
    """

    target = "x"  # what of the data it learns

    def __init__(self, *, l1: float = 1.0, l2: float = 1.0, commitment: float = 0.25):
        self.weights = {"l1": l1, "l2": l2, "commitment": commitment}

    def __call__(self, model: Any, target: Tensor, cond: Cond, layout: Layout | None, rng: Rng) -> dict[str, Tensor]:
        """{"l1", "l2", a name for each loss of the tokenizer, "_psnr": each [B]} for images target [B, C, *grid] in [-1, 1].

        A loss of the tokenizer whose weight is not an option here enters with weight 1. "_psnr" is in dB and not a loss.
        """
        reconstruction, encoded = model(target)
        error = (reconstruction - target).float().flatten(1)  # [B, C * pixels]
        l1, l2 = error.abs().mean(1), error.square().mean(1)
        losses = {"l1": l1, "l2": l2} | encoded.losses
        weighted = {name: self.weights.get(name, 1.0) * value for name, value in losses.items()}
        # 10 log10(range^2 / mean squared error) with a range of 2.
        return weighted | {"_psnr": 10 * torch.log10(4 / l2.detach().clamp_min(1e-10))}

    def predictor(self, model: Any, cond: Cond, layout: Layout) -> NoReturn:
        """A tokenizer makes nothing new. Raises GenkitError."""
        raise GenkitError(
            "a tokenizer is not sampled; train a generator on its tokens, or use `genkit encode` and `genkit decode`"
        )
