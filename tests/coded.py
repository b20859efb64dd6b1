"""What the tests of coding share: ids as images have them, a tokenizer, a generator that knows what it codes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from genkit.tokenizers.vq import VQ


def some_ids(seed: int, *shape: int, codebook_size: int) -> np.ndarray:
    """Ids that resemble their left neighbours, some far more frequent than others."""
    rng = np.random.default_rng(seed)
    drawn = (codebook_size * rng.random(shape) ** 3).astype(np.int64)
    for x in range(1, shape[-1]):
        drawn[..., x] = np.where(rng.random(shape[:-1]) < 0.6, drawn[..., x - 1], drawn[..., x])
    return drawn


def tokenizer(**changes) -> VQ:
    torch.manual_seed(0)
    made = VQ(
        **{"image_channels": 1, "stride": 4, "width": 8, "num_blocks": 1, "channels": 8, "codebook_size": 64} | changes
    ).eval()
    with torch.no_grad():  # some codes are used more than others, and none exactly as much
        made.quantizer.codebook.recent.copy_(torch.rand(1, changes.get("codebook_size", 64)) ** 4)
    return made.requires_grad_(False)


class Stripes(nn.Module):
    """Knows that all ids of a row are equal, and is the surer the more of the row it sees."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(codebook_size=9)

    def forward(self, x, t, cond, layout, cache=None):
        seen = nn.functional.one_hot(x, 10)[..., :9].sum(3, keepdim=True).double()  # [B, Q, Y, 1, 9]
        return (seen * 3).expand(*x.shape, 9)


def of_stripes() -> SimpleNamespace:
    """What is loaded of the run of a masked generator, whose network is Stripes."""
    return SimpleNamespace(objective={"type": "masked"}, backbone=Stripes(), device="cpu", folder="stripes")
