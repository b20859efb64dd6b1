"""One training step of the masked generator against the same size written plainly with torch.nn.TransformerEncoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from genkit.backbones.masked import Masked as Backbone
from genkit.bench import Case
from genkit.nn.layout import dense_layout
from genkit.objectives.masked import Masked as Objective
from genkit.optim import adamw
from genkit.rng import Rng

NUM_CLASSES = 10
LR = 1e-3


def cases(quick: bool) -> Iterable[Case]:
    """Masking, forward, backward, clipping and the optimiser's step; label smoothing 0.1 on both sides.

    Both have the same attention (no rotary positions, no norm of queries and keys), learned positions and the same `dropout`: 0.1 as
    MaskGIT trains and as torch's layer has it by default, and none, where matrix products are all that counts. They differ in the
    condition: ours modulates every block by the class (adaLN), the peer puts a class token in front of the sequence; and in what dropout
    means: ours drops in both residual branches, torch's layer also inside attention and MLP.
    """
    small: dict[str, Any] = {"dim": 192, "depth": 6, "num_heads": 6, "batch_size": 64, "grid": (7, 7)}
    large: dict[str, Any] = {"dim": 256, "depth": 8, "num_heads": 8, "batch_size": 16, "grid": (16, 16)}
    for size in (small,) if quick else (small, large):
        for dropout in (0.1, 0.0):
            yield _case(**size, codebook_size=1024, dropout=dropout)


def _case(
    *, dim: int, depth: int, num_heads: int, codebook_size: int, batch_size: int, grid: tuple[int, ...], dropout: float
) -> Case:
    ids = Rng.at(0, 0, batch_size).integers(codebook_size, 1, *grid)  # [B, 1, *grid]
    label = torch.arange(batch_size) % NUM_CLASSES
    size: dict[str, Any] = {"dim": dim, "depth": depth, "num_heads": num_heads, "codebook_size": codebook_size}
    size["dropout"] = dropout
    name = f"masked train step, {depth}x{dim}, {batch_size}x{math.prod(grid)} tokens, {codebook_size} codes, dropout {dropout}"
    peer_name = f"torch.nn.TransformerEncoder {torch.__version__}"
    return Case(name, peer_name, 1.2, our_step(ids, label, **size), peer_step(ids, label, **size))


def our_step(
    ids: Tensor, label: Tensor, *, dim: int, depth: int, num_heads: int, codebook_size: int, dropout: float
) -> Callable[[], Tensor]:
    """One step of the loop of genkit.training, without logging and averaging."""
    grid = tuple(ids.shape[2:])
    mixer = {"type": "attention", "num_heads": num_heads, "qk_norm": False, "rope": False}
    model = Backbone(
        codebook_size=codebook_size,
        num_levels=1,
        num_classes=NUM_CLASSES,
        grid=grid,
        dim=dim,
        depth=depth,
        mixer=mixer,
        dropout=dropout,
    ).train()
    objective, layout = Objective(label_smoothing=0.1), dense_layout(grid)
    optimizer = adamw(model, {"lr": LR, "betas": (0.9, 0.95), "weight_decay": 0.03})
    samples = 0

    def step() -> Tensor:
        nonlocal samples
        loss = objective(model, ids, {"label": label}, layout, Rng.at(0, samples, len(ids)))["nll"].mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        samples += len(ids)
        return loss.detach()

    return step


class Plain(nn.Module):
    """[B, N] ids, mask id = codebook_size -> [B, N, S] logits: the model most people would write first."""

    def __init__(self, *, dim: int, depth: int, num_heads: int, codebook_size: int, num_tokens: int, dropout: float):
        super().__init__()
        self.ids = nn.Embedding(codebook_size + 1, dim)
        self.label = nn.Embedding(NUM_CLASSES + 1, dim)
        self.position = nn.Parameter(torch.randn(num_tokens + 1, dim) * 0.02)
        layer = nn.TransformerEncoderLayer(
            dim, num_heads, 4 * dim, dropout=dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
        self.head = nn.Linear(dim, codebook_size)

    def forward(self, ids: Tensor, label: Tensor) -> Tensor:
        h = torch.cat([self.label(label).unsqueeze(1), self.ids(ids)], dim=1) + self.position  # [B, 1 + N, D]
        return self.head(self.blocks(h)[:, 1:])


def peer_step(
    ids: Tensor, label: Tensor, *, dim: int, depth: int, num_heads: int, codebook_size: int, dropout: float
) -> Callable[[], Tensor]:
    """The same step with the defaults of torch: all logits, the loss masked afterwards, AdamW as it comes."""
    target = ids.flatten(1)  # [B, N]
    B, N = target.shape
    model = Plain(
        dim=dim, depth=depth, num_heads=num_heads, codebook_size=codebook_size, num_tokens=N, dropout=dropout
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.03)

    def step() -> Tensor:
        count = (torch.cos(torch.rand(B, 1) * math.pi / 2) * N).ceil().clamp(min=1)
        masked = torch.rand(B, N).argsort(dim=1).argsort(dim=1) < count  # [B, N]
        dropped = torch.where(torch.rand(B) < 0.1, NUM_CLASSES, label)
        logits = model(torch.where(masked, codebook_size, target), dropped)  # [B, N, S]
        nll = cross_entropy(logits.transpose(1, 2), target, reduction="none", label_smoothing=0.1)  # [B, N]
        loss = (nll * masked).sum() / masked.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
