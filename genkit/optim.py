"""Optimiser and learning rate as functions of the `train` section."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


def adamw(model: nn.Module, train: dict[str, Any]) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only (Loshchilov & Hutter 2019); norms, biases and embeddings are exempt, and parameters that a
    module names in its `undecayed`: decay rates and the like, for which 0 is no neutral value.

    The fused kernel does one pass over the parameters; on a CPU it is several times faster than the loop over tensors.
    """
    spared = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    spared |= {id(getattr(m, name)) for m in model.modules() for name in getattr(m, "undecayed", ())}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in spared]
    exempt = [p for p in trained if p.ndim < 2 or id(p) in spared]
    groups = [
        {"params": decayed, "weight_decay": train["weight_decay"]},
        {"params": exempt, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=train["lr"], betas=tuple(train["betas"]), fused=True
    )


def learning_rate(train: dict[str, Any], samples: int) -> float:
    """Linear warm-up over `warmup_samples`, then constant or a cosine to zero at `num_samples`.

    Args:
        samples: samples seen at the end of the step that is about to be taken, so that the first step of a warm-up is not zero.
    """
    warmup, total = train["warmup_samples"], train["num_samples"]
    rise = min(1.0, samples / warmup) if warmup else 1.0
    if train["schedule"] == "constant":
        return train["lr"] * rise
    progress = min(1.0, max(0.0, (samples - warmup) / max(1, total - warmup)))
    return train["lr"] * rise * 0.5 * (1 + math.cos(math.pi * progress))
