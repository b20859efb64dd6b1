"""Symbols to bytes and back: a range asymmetric numeral system with one state per lane, all lanes at once.

Duda, "Asymmetric numeral systems: entropy coding combining speed of Huffman coding with compression rate of arithmetic coding", 2013. A lane
is a 64-bit state x. A symbol that owns the interval [start, start + freq) of 2^precision makes of it

    x <- (x // freq) 2^precision + start + x % freq

after the low 32 bits were moved out where x would not fit otherwise. The state starts at 0 and is stored without its leading zero bytes, so
that a lane costs about one byte more than the information in it, however short it is: lanes can be single images or single packets.

Everything is integer arithmetic: the same symbols and intervals give the same bytes on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

MAX_PRECISION = 26  # the interval's resolution must stay well below the 32 bits that a working state has at least
_WORD = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)


def encode(starts: Ints, freqs: Ints, precisions: Sequence[int]) -> list[bytes]:
    """The bytes of N lanes of T symbols each.

    Args:
        starts, freqs: [T, N] int64, the interval of every symbol, in the order of decoding; freq 0 = this lane has no symbol here.
        precisions: [T], log2 of the whole that the intervals of a step are parts of.
    """
    T, N = starts.shape
    x = np.zeros(N, np.uint64)
    words = np.zeros((T, N), np.uint32)
    is_moved = np.zeros((T, N), bool)
    for t in reversed(range(T)):
        precision = np.uint64(precisions[t])
        start, freq = starts[t].astype(np.uint64), freqs[t].astype(np.uint64)
        is_full = (freq > 0) & ((x >> (np.uint64(64) - precision)) >= freq)
        words[t], is_moved[t] = x & _LOW, is_full
        x = np.where(is_full, x >> _WORD, x)
        quotient, rest = np.divmod(x, np.maximum(freq, np.uint64(1)))
        x = np.where(freq > 0, (quotient << precision) + start + rest, x)
    # The decoder takes the words back in the order of its steps.
    stream = words.T[is_moved.T].astype("<u4").tobytes()
    ends = 4 * is_moved.sum(0).cumsum()
    lanes, begin = [], 0
    for state, end in zip(x.tolist(), ends.tolist(), strict=True):
        lanes.append(state.to_bytes((state.bit_length() + 7) // 8, "little") + stream[begin:end])
        begin = end
    return lanes


class Decoder:
    """The inverse of `encode`, a step at a time: look at `slots`, find the symbols that own them, `advance` by their intervals.

    Any bytes can be decoded, to something; `is_complete` says afterwards whether they were what an encoder wrote.
    """

    def __init__(self, lanes: Sequence[bytes]):
        # A state that was ever moved out of has 5 to 8 bytes, and words have 4: the length alone says where the state ends.
        heads = [len(lane) if len(lane) <= 8 else 5 + (len(lane) - 5) % 4 for lane in lanes]
        self._x = np.array(
            [int.from_bytes(lane[:head], "little") for lane, head in zip(lanes, heads, strict=True)], np.uint64
        )
        counts = [(len(lane) - head) // 4 for lane, head in zip(lanes, heads, strict=True)]
        # One more word, so that a lane which is used up still has a place to look at.
        self._words = np.frombuffer(
            b"".join(lane[head:] for lane, head in zip(lanes, heads, strict=True)) + bytes(4), "<u4"
        ).astype(np.uint64)
        self._end = np.cumsum(counts, dtype=np.int64) if counts else np.zeros(0, np.int64)
        self._next = self._end - np.array(counts, np.int64)

    def slots(self, precision: int) -> Ints:
        """[N] int64 in [0, 2^precision): a point in the interval of each lane's next symbol."""
        return (self._x & np.uint64((1 << precision) - 1)).astype(np.int64)

    def advance(self, start: Ints, freq: Ints, precision: int) -> None:
        """Take the symbols with these intervals [N] off the lanes; freq 0 = leave the lane as it is."""
        scale = np.uint64(precision)
        slot = self._x & np.uint64((1 << precision) - 1)
        x = freq.astype(np.uint64) * (self._x >> scale) + slot - start.astype(np.uint64)
        self._x = np.where(freq > 0, x, self._x)
        is_low = (freq > 0) & (self._x <= _LOW) & (self._next < self._end)
        self._x = np.where(
            is_low, (self._x << _WORD) | self._words[np.minimum(self._next, len(self._words) - 1)], self._x
        )
        self._next += is_low

    def is_complete(self) -> NDArray[np.bool_]:
        """[N]: whether a lane is used up and back at the state its encoder began with."""
        return (self._x == 0) & (self._next == self._end)
