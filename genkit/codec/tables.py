"""Whole weights to intervals that a coder can use: the only place where probabilities are made, and they are made of whole numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
# float64 that holds whole numbers below 2^53: sums, products and quotients of them are exact in any order on any machine, and dividing them
# takes a tenth of the time of int64.
Whole = NDArray[np.float64]

MAX_SYMBOLS = 2**18


def precision_of(num_symbols: int) -> int:
    """log2 of what the intervals of an alphabet add up to.

    Every symbol owns at least one part, so 1/256 to 1/128 of the whole is shared evenly: it costs at most 0.011 bits per symbol and bounds the
    price of a surprise. More would only make the first symbol of every lane dearer.
    """
    return (num_symbols - 1).bit_length() + 7


def max_total(precision: int) -> int:
    """What the weights of a row may add up to, so that every product below stays under 2^53."""
    return 1 << (53 - precision)


def quotient(a: Whole, b: Whole) -> Whole:
    """floor(a / b) for whole 0 <= a < 2^53 and b > 0. Exact: where a / b is not whole it is at least 1 / b from it, more than the rounding."""
    return np.floor(a / b)


class Tables:
    """Rows of intervals, one row per context.

    Args:
        weights: [C, S] whole numbers >= 0, in any unit; each row's sum between 1 and max_total(precision).
        precision: see `precision_of`.
        exists: [C, S] bool; False where a row has fewer than S symbols. The weights are 0 there.
    """

    def __init__(self, weights: Whole, precision: int, exists: NDArray[np.bool_] | None = None):
        C, S = weights.shape
        self.precision, self._num_symbols = precision, S
        floor = np.arange(1.0, S + 1)[None] if exists is None else exists.cumsum(1, dtype=np.float64)  # one part each
        sums = weights.cumsum(1)
        self._bounds = np.zeros((C, S + 1), np.int64)
        self._bounds[:, 1:] = floor + quotient(sums * ((1 << precision) - floor[:, -1:]), sums[:, -1:])
        self._keys: Ints | None = None

    def intervals(self, contexts: Ints, symbols: Ints) -> tuple[Ints, Ints]:
        """(start, freq) of symbols in the rows of their contexts, both shaped like `symbols`."""
        start = self._bounds[contexts, symbols]
        return start, self._bounds[contexts, symbols + 1] - start

    def find(self, contexts: Ints, slots: Ints) -> Ints:
        """The symbols [N] that own slots [N] in the rows of contexts [N]."""
        if self._keys is None:
            # All rows one after another are one rising row: a single binary search serves every context.
            first = np.arange(len(self._bounds), dtype=np.int64)[:, None] << self.precision
            self._keys = (self._bounds[:, 1:] + first).ravel()
        found = np.searchsorted(self._keys, slots + (contexts << self.precision), side="right")
        return found - contexts * self._num_symbols
