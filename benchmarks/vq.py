"""Nearest-code look-up and codebook update: genkit.nn.quantize against vector-quantize-pytorch at equal settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from genkit.bench import Case
from genkit.nn.quantize import Quantizer

DECAY = 0.99
PEER = "vector-quantize-pytorch"


def cases(quick: bool) -> Iterable[Case]:
    """Training steps of the quantiser alone: look-up, statistics, update of the table; `+ backward` adds the gradient to the input."""
    yield _case("1k codes, 2048 x 256", (1, 2048, 256), 1024)
    yield _case("1k codes, 2048 x 256, + backward", (1, 2048, 256), 1024, backward=True)
    yield _case("1k codes, 2048 x 256, cosine", (1, 2048, 256), 1024, cosine=True)
    if not quick:
        yield _case("1k codes, 8x256x16x16", (8, 256, 16, 16), 1024)
        yield _case("16k codes, 8x256x16x16", (8, 256, 16, 16), 16384)


def _case(
    name: str, shape: tuple[int, ...], codebook_size: int, *, cosine: bool = False, backward: bool = False
) -> Case:
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=backward)
    ours, peer = sides(x, codebook_size, cosine=cosine)
    return Case(f"vq train step, {name}", _peer_name(), 2.0, ours, peer)


def sides(x: Tensor, codebook_size: int, *, cosine: bool) -> tuple[Callable[[], Any], Callable[[], Any] | str]:
    """One training step on x, [B, N, D] or [B, D, Y, X], by us and by the peer, from the same codes.

    Each returns (codes, ids, table after the step).
    """
    is_image = x.ndim == 4
    dim = x.shape[1] if is_image else x.shape[2]
    quantizer = Quantizer(dim=dim, codebook_size=codebook_size, cosine=cosine, decay=DECAY).train()
    quantizer.codebook.set_codes(quantizer.codebook.embed.clone())

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        found = quantizer(x.movedim(1, -1) if is_image else x)
        codes = found.codes.movedim(-1, 1) if is_image else found.codes
        if x.requires_grad:
            _backward(x, codes, found.losses["commitment"].mean())
        quantizer.codebook.after_step()
        return codes, found.ids, quantizer.codebook.embed

    try:
        from vector_quantize_pytorch import VectorQuantize
    except ImportError:
        return ours, "not installed; pip install 'genkit-torch[bench]'"
    other = VectorQuantize(
        dim=dim,
        codebook_size=codebook_size,
        use_cosine_sim=cosine,
        accept_image_fmap=is_image,
        decay=DECAY,
        rotation_trick=False,
    ).train()
    other._codebook.embed.copy_(quantizer.codebook.embed)
    other._codebook.embed_avg.copy_(quantizer.codebook.embed)

    def peer() -> tuple[Tensor, Tensor, Tensor]:
        codes, ids, loss = other(x)
        if x.requires_grad:
            _backward(x, codes, loss)
        return codes, ids, other._codebook.embed

    return ours, peer


def _backward(x: Tensor, codes: Tensor, loss: Tensor) -> None:
    x.grad = None
    (codes.square().mean() + loss.sum()).backward()


def _peer_name() -> str:
    try:
        return f"{PEER} {version(PEER)}"
    except PackageNotFoundError:
        return PEER
