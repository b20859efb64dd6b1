"""How the tests of networks on noisy latents call them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genkit.interfaces import Layout
from genkit.nn.layout import dense_layout


def noisy(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(
    model: Any, x: Tensor, t: Tensor | None = None, label: Tensor | None = None, layout: Layout | None = None
) -> Tensor:
    """model(x, t, {label}) on the grid of x; times spread over the batch where none are given."""
    t = torch.linspace(0.1, 0.9, len(x)) if t is None else t
    return model(x, t, {} if label is None else {"label": label}, layout or dense_layout(tuple(x.shape[2:])))
