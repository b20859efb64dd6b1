"""k-means in integers: the same clusters on every machine, so that a file need not carry them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from genkit.codec.stream import Ints

_LARGEST = 4095  # of a coordinate and of a weight
_LLOYD_STEPS = 30


def whole_numbers(vectors: NDArray[np.floating]) -> tuple[Ints, float]:
    """Vectors [S, d] -> (int64 of the same shape in -4095 .. 4095, what they have to be divided by to come back)."""
    scale = _LARGEST / max(float(np.abs(vectors).max()), 1e-30)
    return np.rint(vectors.astype(np.float64) * scale).astype(np.int64), scale


def kmeans(vectors: Ints, weights: Ints, count: int) -> tuple[Ints, Ints]:
    """Lloyd's k-means from the greedy start: the heaviest vector, then whichever has the largest weight x squared distance to the chosen.

    All sums and products are integers below 2^53 (4095^2 x 4095 x 2^16 vectors of up to 2^8 dimensions stays below it where it is summed), so
    float64 holds them exactly and matrix products may add in any order.

    Args:
        vectors: [S, d] int64 in -4095 .. 4095.
        weights: [S] int64 in 0 .. 4095.
        count: k, at most S.

    Returns: centres [k, d] int64, rounded weighted means; labels [S] int64, the nearest centre, the first among equals. A cluster without
        weight keeps its centre.
    """
    x, w = vectors.astype(np.float64), weights.astype(np.float64)
    chosen = [int(weights.argmax())]
    distance = np.square(x - x[chosen[0]]).sum(1)
    while len(chosen) < count:
        chosen.append(int((w * distance).argmax()))
        distance = np.minimum(distance, np.square(x - x[chosen[-1]]).sum(1))
    centres, labels = x[chosen], np.full(len(x), -1)
    for _ in range(_LLOYD_STEPS):
        before, labels = labels, nearest(x, centres)
        if (labels == before).all():
            break
        member = np.zeros((count, len(x)))
        member[labels, np.arange(len(x))] = w
        mass = member.sum(1, keepdims=True)
        means = np.floor((2 * (member @ x) + mass) / np.maximum(2 * mass, 1))  # rounded to whole numbers
        centres = np.where(mass > 0, means, centres)
    return centres.astype(np.int64), nearest(x, centres)


def nearest(x: NDArray[np.float64], centres: NDArray[np.float64]) -> Ints:
    """[S] int64: the nearest of centres [k, d] for each row of x [S, d]; both hold whole numbers."""
    return (np.square(centres).sum(1) - 2 * (x @ centres.T)).argmin(1)
