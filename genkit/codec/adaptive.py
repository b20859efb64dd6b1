"""Ids coded by what was seen so far: their neighbours' classes in context. Nothing about it is stored; the decoder counts along.

Classes are clusters of the codebook. An id is coded as its class, given the classes to its left and above, then as itself within the class by
how often it came up; classes make neighbours comparable long before the same pair of ids has been seen twice (Brown et al., "Class-based
n-gram models of natural language", 1992). The distribution over classes backs off from both neighbours, to the mean over one of them, to none
(MacKay and Peto, "A hierarchical Dirichlet language model", 1995), in whole numbers throughout.

Images learn from each other and are coded side by side, in blocks that grow with what is known; within a block only earlier positions are
seen. Image j of every block goes to lane j. To decode an image, those before it in its chunk are decoded as well.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from genkit.codec import ans
from genkit.codec.cluster import kmeans
from genkit.codec.damaged import DamagedError
from genkit.codec.tables import Ints, Tables, Whole, precision_of, quotient

MAX_IDS = 2**18  # in a chunk: then every sum stays below 2^53
_WIDEST = 64  # images side by side: wider is faster, learns later, and costs a byte or two per lane
_ONE = 2.0**16  # probability 1 while distributions are mixed
# How many observations a coarser distribution counts for. On ids of small images: 4 and 16 beat 4 and 4, 16 and 4 by up to 0.08 bits.
_TRUST_NONE, _TRUST_ONE = 4.0, 16.0


def classes_of(vectors: Ints) -> Ints:
    """[S] int64: a class for each code of vectors [S, d] (see cluster.whole_numbers); eight codes to a class on average, at most 64 classes."""
    S = len(vectors)
    return kmeans(vectors, np.ones(S, np.int64), min(64, max(1, S // 8)))[1]


def fingerprint(classes: Ints) -> bytes:
    """4 bytes that differ where the classes do."""
    return zlib.crc32(classes.astype("<u4").tobytes()).to_bytes(4, "little")


class _Level:
    """Counts of one quantiser level, and the intervals they stand for."""

    def __init__(self, classes: Ints):
        S, K = len(classes), int(classes.max()) + 1
        self.none = K  # the class of a neighbour outside the image
        self.classes = classes
        sizes = np.bincount(classes, minlength=K)
        order = classes.argsort(kind="stable")
        self._place = np.empty(S, np.int64)  # of each id among the members of its class
        self._place[order] = np.arange(S) - (sizes.cumsum() - sizes)[classes[order]]
        self._exists = np.arange(sizes.max()) < sizes[:, None]  # [K, most]
        self._exists[sizes == 0, 0] = True  # a class without members is never coded, but its row needs a sum
        self._member = np.zeros(self._exists.shape, np.int64)
        self._member[classes, self._place] = np.arange(S)
        self._class_precision, self._member_precision = precision_of(K), precision_of(int(sizes.max()))
        self._by_none = np.zeros(K)
        self._by_left, self._by_above = np.zeros((2, K + 1, K))
        self._by_both = np.zeros((K + 1, K + 1, K))
        self._used = self._exists.astype(np.float64)

    @property
    def precisions(self) -> list[int]:
        return [self._class_precision, self._member_precision]

    def class_tables(self, left: Ints, above: Ints) -> Tables:
        """A row of intervals over the classes for each pair of neighbours [N]."""
        none = quotient((2 * self._by_none + 1) * _ONE, 2 * self._by_none.sum() + len(self._by_none))  # [K]

        def mixed(counts: Whole) -> Whole:
            return quotient(counts * _ONE + _TRUST_NONE * none, counts.sum(1, keepdims=True) + _TRUST_NONE)

        one = quotient(mixed(self._by_left[left]) + mixed(self._by_above[above]), np.array(2.0))  # [N, K]
        return Tables(self._by_both[left, above] * _ONE + _TRUST_ONE * one, self._class_precision)

    def begin_row(self) -> None:
        """Bring `members`, a row of intervals over the members of each class, up to date: once a row of ids is often enough."""
        self.members = Tables(self._used, self._member_precision, self._exists)

    def places(self, ids: Ints) -> tuple[Ints, Ints]:
        """ids -> (their classes, their places in them)."""
        return self.classes[ids], self._place[ids]

    def ids(self, classes: Ints, places: Ints) -> Ints:
        """The inverse of `places`."""
        return self._member[classes, places]

    def learn(self, left: Ints, above: Ints, classes: Ints, places: Ints) -> None:
        np.add.at(self._by_none, classes, 1)
        np.add.at(self._by_left, (left, classes), 1)
        np.add.at(self._by_above, (above, classes), 1)
        np.add.at(self._by_both, (left, above, classes), 1)
        np.add.at(self._used, (classes, places), 3)  # against 1 for an id never seen


class Adaptive:
    """The prior "adaptive".

    Args:
        classes: [Q, S] int64, see `classes_of`.
    """

    kind = "adaptive"

    def __init__(self, classes: Ints):
        self._classes = classes
        self.table = fingerprint(classes)  # of the classes the file says only whether they are the right ones

    def encode(self, images: Sequence[Ints]) -> list[bytes]:
        """ids [Q, *grid] of the images of a chunk -> its lanes."""
        levels = self._fresh()
        grids = [ids.shape[1:] for ids in images]
        starts, freqs, precisions = [], [], []
        for first, last in _blocks(grids):
            block = np.stack([ids.reshape(len(ids), *_plane(ids.shape[1:])) for ids in images[first:last]])
            for level, ids, left, above in _walk(levels, block):
                symbols = level.places(ids)
                tables = (level.class_tables(left, above), level.members)
                contexts = (np.arange(len(ids)), symbols[0])
                for table, context, symbol in zip(tables, contexts, symbols, strict=True):
                    start, freq = table.intervals(context, symbol)
                    starts.append(start)
                    freqs.append(freq)
                precisions += level.precisions
                level.learn(left, above, *symbols)
        width = num_lanes(grids)
        return ans.encode(_padded(starts, width), _padded(freqs, width), precisions)

    def decode(self, lanes: Sequence[bytes], grids: Sequence[tuple[int, ...]], wanted: int) -> list[Ints]:
        """The first `wanted` images of a chunk. Raises DamagedError for bytes that no encoder wrote, if all are wanted."""
        levels, images = self._fresh(), []
        decoder = ans.Decoder(lanes)
        for first, last in _blocks(grids):
            if first >= wanted:
                break
            block = np.zeros((last - first, len(levels), *_plane(grids[first])), np.int64)  # [N, Q, Y, X]
            for level, ids, left, above in _walk(levels, block):
                N = len(ids)
                symbols: list[Ints] = []
                for table in (level.class_tables(left, above), level.members):
                    context = symbols[0] if symbols else np.arange(N)
                    symbols.append(table.find(context, decoder.slots(table.precision)[:N]))
                    start, freq = table.intervals(context, symbols[-1])
                    start, freq = _padded([start, freq], len(lanes))
                    decoder.advance(start, freq, table.precision)
                ids[:] = level.ids(symbols[0], symbols[1])
                level.learn(left, above, symbols[0], symbols[1])
            images += [ids.reshape(-1, *grid) for ids, grid in zip(block, grids[first:last], strict=True)]
        if wanted >= len(grids) and not decoder.is_complete().all():
            raise DamagedError("holds ids that do not end where they should; the file is damaged")
        return images[:wanted]

    def _fresh(self) -> list[_Level]:
        return [_Level(classes) for classes in self._classes]


def num_lanes(grids: Sequence[tuple[int, ...]]) -> int:
    """Lanes of a chunk of images with these grids."""
    return max(last - first for first, last in _blocks(grids))


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


def _walk(levels: list[_Level], ids: Ints) -> Iterator[tuple[_Level, Ints, Ints, Ints]]:
    """Every position of ids [N, Q, Y, X] in the order of coding: its level, the ids there (a view), the neighbours' classes; [N] each."""
    N, Q, Y, X = ids.shape
    for q in range(Q):
        level = levels[q]
        outside = np.full(N, level.none)
        for y in range(Y):
            level.begin_row()
            for x in range(X):
                left = level.classes[ids[:, q, y, x - 1]] if x else outside
                above = level.classes[ids[:, q, y - 1, x]] if y else outside
                yield level, ids[:, q, y, x], left, above


def _padded(rows: Sequence[Ints], width: int) -> Ints:
    """Rows of up to `width` numbers -> [len(rows), width], zeros behind."""
    whole = np.zeros((len(rows), width), np.int64)
    for row, target in zip(rows, whole, strict=True):
        target[: len(row)] = row
    return whole
