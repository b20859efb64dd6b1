"""Exponential moving average of a model's parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Averaged parameters beside a model, updated once per optimiser step.

    `average <- d average + (1 - d) parameter` with d = min(decay, (1 + step) / (10 + step)), so that early averages are not dominated by the
    initial weights. Buffers (codebooks, running statistics) are not averaged: the model's own are used.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.decay = decay
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.average = [p.detach().clone().float() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, [p.detach().float() for p in self.parameters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with averaged parameters, inside the block. Swaps storage: nothing is copied."""
        raw = [p.data for p in self.parameters]
        for parameter, average in zip(self.parameters, self.average, strict=True):
            parameter.data = average.to(parameter.dtype)
        try:
            yield
        finally:
            for parameter, kept in zip(self.parameters, raw, strict=True):
                parameter.data = kept

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take the averages from a state dict of the model (the saved `ema` variant)."""
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        for name, average in zip(names, self.average, strict=True):
            average.copy_(state[name])
