"""Entropies of assignments to codes, and means over a batch that is spread over processes."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from genkit.nn.global_rows import is_distributed


def entropy(p: Tensor) -> Tensor:
    """Probabilities [..., S] -> [...], nats. Its gradient is finite where a probability is 0."""
    return -(p * p.clamp_min(1e-12).log()).sum(-1)


def over_processes(mean: Tensor) -> Tensor:
    """The mean over all processes in value, with the gradient of this one's share: averaged over processes, gradients are those of one batch."""
    if not is_distributed():
        return mean
    whole = mean.detach().clone()
    dist.all_reduce(whole)
    return mean + (whole / dist.get_world_size() - mean.detach())
