"""State-space duality: the compiled path against chunked torch, at growing length; both sides by the one public function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from genkit.bench import Case
from genkit.kernels.ssd.op import ssd

B, H, K = 2, 6, 64  # width 384


def cases(quick: bool) -> Iterable[Case]:
    for N in (256, 1024) if quick else (256, 1024, 4096, 16384):
        inputs = _inputs(N)
        yield Case(f"ssd N={N}", "chunked torch", 1.5, *(_forward(inputs, path) for path in ("cpu", "torch")))
        if N <= 4096:  # the peer's intermediate results of more fill the memory
            yield Case(
                f"ssd N={N} and gradients", "chunked torch", 1.5, *(_both(inputs, path) for path in ("cpu", "torch"))
            )
    yield from _limits(4096 if quick else 16384)
    yield from _step()


def _inputs(N: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, N, H, K, generator=random) for _ in range(3))
    x = torch.randn(B, N, H, generator=random)
    return {"q": q, "k": k, "v": v, "g": torch.nn.functional.logsigmoid(x) / 16}


def _forward(inputs: dict[str, Any], path: str) -> Callable[[], object]:
    @torch.no_grad()
    def run() -> object:
        return ssd(**inputs, path=path)

    return run


def _both(inputs: dict[str, Any], path: str) -> Callable[[], object]:
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    upstream = torch.randn_like(inputs["v"])

    def run() -> object:
        return torch.autograd.grad(ssd(**leaves, path=path), list(leaves.values()), upstream)

    return run


def _limits(N: int) -> Iterator[Case]:
    """How the time grows with length, and how far from the speed of a plain matrix product of as many operations it is."""
    yield Case(
        f"ssd N={N} in the time of 4 x N={N // 4}",
        "four times the shorter one",
        4 / 4.6,
        _forward(_inputs(N), "cpu"),
        _times(4, _forward(_inputs(N // 4), "cpu")),
    )
    # Writing and reading a state of K x K are 4 K K operations per token and head.
    size = round((2 * B * H * N * K * K) ** (1 / 3))
    left, right = torch.randn(size, size), torch.randn(size, size)
    yield Case(
        f"ssd N={N}", f"matmul of as many operations, {size}^3", 0.4, _forward(_inputs(N), "cpu"), lambda: left @ right
    )


def _times(n: int, run: Callable[[], object]) -> Callable[[], object]:
    def repeated() -> None:
        for _ in range(n):
            run()

    return repeated


def _step() -> Iterator[Case]:
    """One token of generation against the step written out in torch."""
    x = _inputs(1)
    state = torch.randn(B, H, K, K)

    @torch.no_grad()
    def ours() -> object:
        return ssd(**x, initial_state=state, return_state=True, path="cpu")

    @torch.no_grad()
    def peer() -> object:
        return ssd(**x, initial_state=state, return_state=True, path="reference")

    yield Case("ssd one token", "the step in torch", 1.0, ours, peer)
