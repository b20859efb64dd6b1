"""Gated linear attention (gla) and state-space duality (ssd): the compiled paths against chunked torch, at growing length; both sides by one public function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from genkit.bench import Case
from genkit.kernels.gla.op import gla
from genkit.kernels.ssd.op import ssd

B, H, K = 2, 6, 64  # width 384
GROWTH = 4.6  # 4 times the tokens may take so many times as long
FORWARD_GOALS = {"gla": 5.0, "ssd": 1.5}
OPS: dict[str, Callable[..., Any]] = {"gla": gla, "ssd": ssd}


def cases(quick: bool) -> Iterable[Case]:
    for name in OPS:
        yield from _cases(name, quick)


def _cases(name: str, quick: bool) -> Iterator[Case]:
    for N in (256, 1024) if quick else (256, 1024, 4096, 16384):
        x = inputs(name, N)
        sides = [forward(name, x, path) for path in ("cpu", "torch")]
        yield Case(f"{name} N={N}", "chunked torch", FORWARD_GOALS[name], *sides)
        if N <= 4096:  # the peer's intermediate results of more fill the memory
            sides = [_both(name, x, path) for path in ("cpu", "torch")]
            yield Case(f"{name} N={N} and gradients", "chunked torch", 1.5, *sides)
    short, long = (forward(name, inputs(name, n), "cpu") for n in (N // 4, N))
    four = f"{name} N={N} in the time of 4 x N={N // 4}"
    yield Case(four, "four times the shorter one", 4 / GROWTH, long, lambda: [short() for _ in range(4)])
    # Writing and reading a state of K x K are 4 K K operations per token and head.
    size = round((2 * B * H * N * K * K) ** (1 / 3))
    left, right = torch.randn(size, size), torch.randn(size, size)
    yield Case(f"{name} N={N}", f"matmul of as many operations, {size}^3", 0.4, long, lambda: left @ right)
    yield _step(name)


def inputs(name: str, N: int) -> dict[str, Any]:
    """One decay per channel of the keys for gla, one per head for ssd."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, N, H, K, generator=random) for _ in range(3))
    x = torch.randn(B, N, H, *((K,) if name == "gla" else ()), generator=random)
    return {"q": q, "k": k, "v": v, "g": torch.nn.functional.logsigmoid(x) / 16}


def forward(name: str, x: dict[str, Any], path: str) -> Callable[[], object]:
    @torch.no_grad()
    def run() -> object:
        return OPS[name](**x, path=path)

    return run


def _both(name: str, x: dict[str, Any], path: str) -> Callable[[], object]:
    leaves = {key: value.clone().requires_grad_() for key, value in x.items()}
    upstream = torch.randn_like(x["v"])

    def run() -> object:
        return torch.autograd.grad(OPS[name](**leaves, path=path), list(leaves.values()), upstream)

    return run


def _step(name: str) -> Case:
    """One token of generation against the step written out in torch."""
    x = inputs(name, 1)
    x["initial_state"] = torch.randn(B, H, K, K)
    x["return_state"] = True
    return Case(
        f"{name} one token", "the step in torch", 1.0, *(forward(name, x, path) for path in ("cpu", "reference"))
    )
