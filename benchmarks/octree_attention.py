"""Attention in windows of octree nodes against the same windows as one batch of torch's attention; growth with the number of nodes.

`genkit bench octree_attention` times the pairs. `python benchmarks/octree_attention.py` prints the growth.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from genkit.bench import Case
from genkit.kernels.octree_attention.op import octree_attention

H, K = 6, 32
SIZES = ((25_000, 32, 1), (100_000, 32, 4), (100_000, 128, 4))  # nodes, window, dilation
GOAL = 2


def cases(quick: bool) -> Iterable[Case]:
    """Four samples, z-ordered nodes; both sides hide other samples and bring the nodes into windows and back."""
    name = f"torch {torch.__version__} batched"
    for M, window, dilation in SIZES[:1] if quick else SIZES:
        size = f"octree attention M{M} H{H} K{K}, window {window}, dilation {dilation}"
        place = {"window": window, "dilation": dilation}
        yield Case(f"{size}, forward", name, GOAL, forward(M, "cpu", **place), forward(M, "torch", **place))
        yield Case(
            f"{size}, forward and backward", name, GOAL, training(M, "cpu", **place), training(M, "torch", **place)
        )


def inputs(M: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(M, H, K, generator=random) for name in "qkv"}


def forward(M: int, path: str, **place: int) -> Callable[[], Tensor]:
    x, samples = inputs(M), torch.arange(M) * 4 // M
    return lambda: octree_attention(**x, batch_ids=samples, path=path, **place)  # type: ignore[arg-type]


def training(M: int, path: str, **place: int) -> Callable[[], Any]:
    x, samples = {name: t.requires_grad_() for name, t in inputs(M).items()}, torch.arange(M) * 4 // M
    return lambda: torch.autograd.grad(
        octree_attention(**x, batch_ids=samples, path=path, **place).sum(),  # type: ignore[arg-type]
        list(x.values()),
    )


def main() -> None:
    """Nanoseconds per node must not grow with the number of nodes."""
    for M in (10_000, 40_000, 160_000):
        run = forward(M, "cpu", window=32, dilation=4)
        run()
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        print(
            f"{M:8} nodes {statistics.median(seconds) * 1e3:8.2f} ms {statistics.median(seconds) / M * 1e9:8.0f} ns per node"
        )


if __name__ == "__main__":
    main()
