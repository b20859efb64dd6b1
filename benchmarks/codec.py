"""Entropy coding of ids: genkit.codec against constriction, both with fixed frequencies and a stretch of bytes for every image.

Ours is NumPy over all images at once, and slower than compiled code that takes one after another; the goal is a tenth of its speed, since the tokenizer's
networks take far longer than either. What it is for: whole-number intervals that a format can state, no dependency, and 4 % less for images of
49 ids, which constriction ends at a multiple of four bytes. The adaptive prior has no peer here: constriction brings coders, not models of ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from genkit.bench import Case
from genkit.codec import adaptive, memoryless
from genkit.codec.tables import Ints

PEER = "constriction"


def cases(quick: bool) -> Iterable[Case]:
    """Ids of many small images, and of a few large ones."""
    for count, side, size in [(1000, 7, 512)] if quick else [(1000, 7, 512), (1000, 16, 1024), (16, 48, 16384)]:
        images = ids_like(count, side, size)
        name = f"{count} images of {side}x{side} ids, {size} codes"
        encode_ours, encode_peer, decode_ours, decode_peer = sides(images, size)
        yield Case(f"encode, {name}", _peer_name(), 0.1, encode_ours, encode_peer)
        yield Case(f"decode, {name}", _peer_name(), 0.1, decode_ours, decode_peer)
    images = ids_like(200 if quick else 1000, 7, 512)
    prior = adaptive.Adaptive(np.arange(512)[None] // 8)
    name = f"adaptive, {len(images)} images of 7x7 ids, 512 codes"
    yield Case(f"encode {name}", PEER, 0.1, lambda: prior.encode(images), "has no such model")
    lanes, grids = prior.encode(images), [(7, 7)] * len(images)
    yield Case(f"decode {name}", PEER, 0.1, lambda: prior.decode(lanes, grids, len(images)), "has no such model")


def ids_like(count: int, side: int, codebook_size: int) -> list[Ints]:
    """Ids with the uneven frequencies of a trained tokenizer's."""
    drawn = np.random.default_rng(0).random((count, 1, side, side))
    return list((codebook_size * drawn**2).astype(np.int64))


def sides(images: list[Ints], codebook_size: int) -> tuple[Callable[[], Any], Any, Callable[[], Any], Any]:
    """Encode by us and by the peer, decode by us and by the peer; by the peer a word on why not where it is not installed."""
    prior = memoryless.static(images, codebook_size)
    lanes, grids = prior.encode(images, "none"), [ids.shape[1:] for ids in images]

    def encode_ours() -> list[list[bytes]]:
        return prior.encode(images, "none")

    def decode_ours() -> list[Ints]:
        return prior.decode(lanes, grids, "none", 1)

    try:
        import constriction
    except ImportError:
        missing = "not installed; pip install 'genkit-torch[bench]'"
        return encode_ours, missing, decode_ours, missing
    counts = np.bincount(np.concatenate([ids.ravel() for ids in images]), minlength=codebook_size)
    model = constriction.stream.model.Categorical(counts / counts.sum(), perfect=False)
    flat = [ids.ravel().astype(np.int32) for ids in images]

    def encode_peer() -> list[Any]:
        found = []
        for ids in flat:
            coder = constriction.stream.stack.AnsCoder()
            coder.encode_reverse(ids, model)
            found.append(coder.get_compressed())
        return found

    coded = encode_peer()

    def decode_peer() -> list[Any]:
        return [
            constriction.stream.stack.AnsCoder(words).decode(model, len(ids))
            for words, ids in zip(coded, flat, strict=True)
        ]

    return encode_ours, encode_peer, decode_ours, decode_peer


def _peer_name() -> str:
    try:
        return f"{PEER} {version(PEER)}"
    except PackageNotFoundError:
        return PEER
