"""Entropy coding of ids: what genkit.codec adds to the calls of constriction that it makes.

Both code a chunk of images as one stream, with the frequencies of its ids, and a packet for every row of ids. The peer gets ids and model ready made and
makes the bare calls; ours joins and cuts images, and counts what it needs. The adaptive prior has no peer: constriction brings coders, not models of ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any

import numpy as np

from genkit.bench import Case
from genkit.codec import adaptive, memoryless
from genkit.codec.stream import Ints

PEER = "constriction"


def cases(quick: bool) -> Iterable[Case]:
    """Ids of many small images, and of a few large ones."""
    peer = f"{PEER} {version(PEER)}"
    for count, side, size in [(1000, 7, 512)] if quick else [(1000, 7, 512), (1000, 16, 1024), (16, 48, 16384)]:
        images = ids_like(count, side, size)
        for packets, sides in (("none", whole(images, size)), ("rows", rows(images, size))):
            name = f"{count} images of {side}x{side} ids, {size} codes, packets: {packets}"
            encode_ours, encode_peer, decode_ours, decode_peer = sides
            yield Case(f"encode, {name}", peer, 0.5, encode_ours, encode_peer)
            yield Case(f"decode, {name}", peer, 0.5, decode_ours, decode_peer)
    images = ids_like(200 if quick else 1000, 7, 512)
    prior = adaptive.Adaptive(np.arange(512)[None] // 8)
    name = f"adaptive, {len(images)} images of 7x7 ids, 512 codes"
    yield Case(f"encode {name}", peer, 0.5, lambda: prior.encode(images), "has no such model")
    lane, grids = prior.encode(images), [(7, 7)] * len(images)
    yield Case(f"decode {name}", peer, 0.5, lambda: prior.decode(lane, grids, len(images)), "has no such model")


Sides = tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any], Callable[[], Any]]


def ids_like(count: int, side: int, codebook_size: int) -> list[Ints]:
    """Ids with the uneven frequencies of a trained tokenizer's."""
    drawn = np.random.default_rng(0).random((count, 1, side, side))
    return list((codebook_size * drawn**2).astype(np.int64))


def whole(images: list[Ints], codebook_size: int) -> Sides:
    """Encode by us and by the peer, decode by us and by the peer: one stream."""
    return _sides(images, codebook_size, "none", [np.concatenate([ids.ravel() for ids in images])])


def rows(images: list[Ints], codebook_size: int) -> Sides:
    """A stream for every row of ids."""
    return _sides(images, codebook_size, "rows", [row for ids in images for row in ids[0]])


def _sides(images: list[Ints], codebook_size: int, packets: str, parts: list[Ints]) -> Sides:
    from constriction import stream

    prior = memoryless.static(images, codebook_size)
    lanes, grids = prior.encode(images, packets), [ids.shape[1:] for ids in images]
    counts = np.bincount(np.concatenate(parts), minlength=codebook_size).astype(np.float64)
    model = stream.model.Categorical(counts, perfect=False)
    flat = [part.astype(np.int32) for part in parts]

    def encode_peer() -> list[Any]:
        found = []
        for ids in flat:
            coder = stream.stack.AnsCoder()
            coder.encode_reverse(ids, model)
            found.append(coder.get_compressed())
        return found

    coded = encode_peer()

    def decode_peer() -> list[Any]:
        return [stream.stack.AnsCoder(words).decode(model, len(ids)) for words, ids in zip(coded, flat, strict=True)]

    return (
        lambda: prior.encode(images, packets),
        encode_peer,
        lambda: prior.decode(lanes, grids, packets, 1),
        decode_peer,
    )
