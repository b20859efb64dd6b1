"""Ids coded by what was seen so far: their neighbours' classes in context. Nothing about it is stored; the decoder counts along.

Classes are clusters of the codebook. An id is coded as its class, given the classes to its left and above, then as itself within the class by
how often it came up; classes make neighbours comparable long before the same pair of ids has been seen twice (Brown et al., "Class-based
n-gram models of natural language", 1992). The distribution over classes backs off from both neighbours, to the mean over one of them, to none
(MacKay and Peto, "A hierarchical Dirichlet language model", 1995).

Images learn from each other and are coded side by side, in blocks that grow with what is known; within a block only earlier positions are
seen. A chunk is one stream: to decode an image, those before it in its chunk are decoded as well.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from genkit.codec.cluster import kmeans
from genkit.codec.damaged import DamagedError
from genkit.codec.stream import Decoder, Encoder, Ints, Rows

_WIDEST = 64  # images side by side: wider is faster and learns later
# How many observations a coarser distribution counts for. On ids of small images: 4 and 16 beat 4 and 4, 16 and 4 by up to 0.08 bits.
_TRUST_NONE, _TRUST_ONE = 4.0, 16.0
_EVEN = 2.0**-7  # this share of the whole goes to all classes alike: 0.3 % less for four levels of ids of small images


def classes_of(vectors: Ints) -> Ints:
    """[S] int64: a class for each code of vectors [S, d] (see cluster.whole_numbers); eight codes to a class on average, at most 64 classes."""
    S = len(vectors)
    return kmeans(vectors, np.ones(S, np.int64), min(64, max(1, S // 8)))[1]


def fingerprint(classes: Ints) -> bytes:
    """4 bytes that differ where the classes do."""
    return zlib.crc32(classes.astype("<u4").tobytes()).to_bytes(4, "little")


class _Level:
    """Counts of one quantiser level, and the distributions they stand for."""

    def __init__(self, classes: Ints):
        S, K = len(classes), int(classes.max()) + 1
        self.none = K  # the class of a neighbour outside the image
        self.classes = classes
        sizes = np.bincount(classes, minlength=K)
        order = classes.argsort(kind="stable")
        self._place = np.empty(S, np.int64)  # of each id among the members of its class
        self._place[order] = np.arange(S) - (sizes.cumsum() - sizes)[classes[order]]
        # A class without members is never coded, but its row needs a sum.
        self._used = (np.arange(sizes.max()) < sizes.clip(min=1)[:, None]).astype(np.float64)  # [K, most]
        self._member = np.zeros(self._used.shape, np.int64)
        self._member[classes, self._place] = np.arange(S)
        self._by_none = np.zeros(K)
        self._by_left, self._by_above = np.zeros((2, K + 1, K))
        self._by_both = np.zeros((K + 1, K + 1, K))

    def class_rows(self, left: Ints, above: Ints) -> Rows:
        """[N, K]: a distribution over the classes for each pair of neighbours [N]."""
        none = (self._by_none + 0.5) / (self._by_none.sum() + 0.5 * len(self._by_none))  # [K]

        def mixed(counts: Rows) -> Rows:
            return (counts + _TRUST_NONE * none) / (counts.sum(1, keepdims=True) + _TRUST_NONE)

        one = (mixed(self._by_left[left]) + mixed(self._by_above[above])) / 2  # [N, K]
        counts = self._by_both[left, above] + _TRUST_ONE * one
        total = self._by_both[left, above].sum(1, keepdims=True) + _TRUST_ONE
        return counts + total * (_EVEN / counts.shape[1])

    def place_rows(self, classes: Ints) -> Rows:
        """[N, most]: a distribution over the members of each of classes [N]."""
        return self._used[classes]

    def places(self, ids: Ints) -> tuple[Ints, Ints]:
        """ids -> (their classes, their places in them)."""
        return self.classes[ids], self._place[ids]

    def ids(self, classes: Ints, places: Ints) -> Ints:
        """The inverse of `places`."""
        return self._member[classes, places]

    def learn(self, left: Ints, above: Ints, classes: Ints, places: Ints, times: int = 1) -> None:
        """Count these; with times=-1 as if they had never been seen."""
        np.add.at(self._by_none, classes, times)
        np.add.at(self._by_left, (left, classes), times)
        np.add.at(self._by_above, (above, classes), times)
        np.add.at(self._by_both, (left, above, classes), times)
        np.add.at(self._used, (classes, places), 3 * times)  # against 1 for an id never seen


class Adaptive:
    """The prior "adaptive".

    Args:
        classes: [Q, S] int64, see `classes_of`.
    """

    kind = "adaptive"

    def __init__(self, classes: Ints):
        self._classes = classes
        self.table = fingerprint(classes)  # of the classes the file says only whether they are the right ones

    def encode(self, images: Sequence[Ints]) -> bytes:
        """ids [Q, *grid] of the images of a chunk -> its stream."""
        levels, encoder = self._fresh(), Encoder()
        blocks = [
            np.stack([ids.reshape(len(ids), *_plane(ids.shape[1:])) for ids in images[first:last]])
            for first, last in _blocks([ids.shape[1:] for ids in images])
        ]
        for block in blocks:
            for level, ids, left, above in _walk(levels, block):
                level.learn(left, above, *level.places(ids))
        # The last is pushed first: with everything counted, what comes after it is forgotten on the way back.
        for block in reversed(blocks):
            for level, ids, left, above in _walk(levels, block, backwards=True):
                classes, places = level.places(ids)
                level.learn(left, above, classes, places, times=-1)
                encoder.push(places, level.place_rows(classes))
                encoder.push(classes, level.class_rows(left, above))
        return encoder.to_bytes()

    def decode(self, lane: bytes, grids: Sequence[tuple[int, ...]], wanted: int) -> list[Ints]:
        """The first `wanted` images of a chunk. Raises DamagedError for bytes that no encoder wrote, if all are wanted."""
        levels, decoder = self._fresh(), Decoder(lane)
        images: list[Ints] = []
        for first, last in _blocks(grids):
            if first >= wanted:
                break
            block = np.zeros((last - first, len(levels), *_plane(grids[first])), np.int64)  # [N, Q, Y, X]
            for level, ids, left, above in _walk(levels, block):
                classes = decoder.pop(len(ids), level.class_rows(left, above))
                places = decoder.pop(len(ids), level.place_rows(classes))
                ids[:] = level.ids(classes, places)
                level.learn(left, above, classes, places)
            images += [ids.reshape(-1, *grid) for ids, grid in zip(block, grids[first:last], strict=True)]
        if wanted >= len(grids) and decoder.rest():
            raise DamagedError("holds ids that do not end where they should; the file is damaged")
        return images[:wanted]

    def _fresh(self) -> list[_Level]:
        return [_Level(classes) for classes in self._classes]


def _plane(grid: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns: "above" the first row of a frame is the last row of the frame before."""
    return math.prod(grid[:-1]), grid[-1]


def _blocks(grids: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, int]]:
    """(first, last) of the images with one grid that are coded side by side: the more, the more was seen before."""
    first = 0
    while first < len(grids):
        last = first + 1
        while last < len(grids) and grids[last] == grids[first] and last - first < min(_WIDEST, 1 + first // 8):
            last += 1
        yield first, last
        first = last


def _walk(levels: list[_Level], ids: Ints, backwards: bool = False) -> Iterator[tuple[_Level, Ints, Ints, Ints]]:
    """Every position of ids [N, Q, Y, X] in the order of decoding: its level, the ids there (a view), the neighbours' classes; [N] each."""
    N, Q, Y, X = ids.shape
    direction = -1 if backwards else 1
    for q in range(Q)[::direction]:
        level = levels[q]
        outside = np.full(N, level.none)
        for y in range(Y)[::direction]:
            for x in range(X)[::direction]:
                left = level.classes[ids[:, q, y, x - 1]] if x else outside
                above = level.classes[ids[:, q, y - 1, x]] if y else outside
                yield level, ids[:, q, y, x], left, above
