"""Symbols to bytes and back by the library constriction, an asymmetric numeral system (Duda, 2013): a stack, what was pushed last comes off first.

Probabilities are float64 in any unit, and the decoder must hand over the very numbers that the encoder did. Those on both sides are made of whole
numbers: sums are taken over whole numbers alone, which are exact in any order, and what follows is one correctly rounded operation at a time, the
same on every machine. constriction rounds them to parts of 2^24, of which every symbol keeps at least one: no surprise costs more than 24 bits.

A stream is stored without the leading zero bytes of its last word. Its first symbol costs up to 24 bits however probable it is, unless the stream begins at a
number that has to be told anyway. That is what makes short streams short: they begin at their last few ids.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genkit.codec.damaged import DamagedError

Ints = NDArray[np.int64]
Rows = NDArray[np.float64]  # [n, S]: a distribution for each of n symbols

MAX_SYMBOLS = 2**18
START_BITS = 20  # of the number a stream begins at: with these and the first symbol the coder's 24 bits are well used


class Shared:
    """One distribution [S] for any number of symbols, prepared once."""

    def __init__(self, weights: NDArray[np.float64]):
        self.model = [_stream().model.Categorical(weights, perfect=False)] if len(weights) > 1 else []


class Encoder:
    """Takes symbols from the last to the first.

    Args:
        start: a number below 2^32 that the decoder finds below all symbols.
    """

    def __init__(self, start: int = 0):
        coder = _stream().stack.AnsCoder
        self._coder = coder(np.array([start], np.uint32)) if start else coder()

    def push(self, symbols: NDArray[np.integer], distribution: Shared | Rows) -> None:
        """Symbols [n] in 0 .. S - 1, which come off in the same order."""
        if model := _model(distribution):
            self._coder.encode_reverse(symbols.astype(np.int32, copy=False), *model)

    def to_bytes(self) -> bytes:
        data: bytes = self._coder.get_compressed().astype("<u4", copy=False).tobytes()
        return data.rstrip(b"\0")


class Decoder:
    """Takes symbols off from the first to the last.

    Any bytes can be decoded, to something; what `rest` says afterwards tells whether they are what an encoder wrote.

    Raises: DamagedError for bytes that end in zero: no stream does.
    """

    def __init__(self, lane: bytes):
        if lane.endswith(b"\0"):
            raise DamagedError("holds ids that end in a zero byte; the file is damaged")
        words = np.frombuffer(lane + bytes(-len(lane) % 4), "<u4")
        self._coder = _stream().stack.AnsCoder(words.astype(np.uint32, copy=False))

    def pop(self, count: int, distribution: Shared | Rows) -> Ints:
        """[count] symbols."""
        if not (model := _model(distribution)):
            return np.zeros(count, np.int64)
        more = [count] if isinstance(distribution, Shared) else []
        found: Ints = self._coder.decode(*model, *more).astype(np.int64)
        return found

    def rest(self) -> int:
        """The number that the stream began at; 2^32 if more is left than such a number."""
        words = self._coder.get_compressed().tolist()
        return 2**32 if len(words) > 1 else sum(words)


def num_raw(codebook_size: int, count: int) -> int:
    """How many of `count` ids a stream may begin at."""
    return min(count, START_BITS // max(1, (codebook_size - 1).bit_length()))


def to_number(ids: NDArray[np.integer], codebook_size: int) -> int:
    """Ids [n] as the digits of a number."""
    number = 0
    for digit in ids.tolist():
        number = number * codebook_size + digit
    return number


def to_ids(number: int, count: int, codebook_size: int) -> list[int]:
    """The inverse; a number too large for `count` ids is one that no encoder wrote, and raises DamagedError."""
    digits = []
    for _ in range(count):
        number, digit = divmod(number, codebook_size)
        digits.append(digit)
    if number:
        raise DamagedError("holds ids that do not end where they should; the file is damaged")
    return digits[::-1]


def _model(distribution: Shared | Rows) -> list[Any]:
    """What constriction needs to know, or nothing: it knows no alphabet of one symbol, which says nothing."""
    if isinstance(distribution, Shared):
        return distribution.model
    return [_stream().model.Categorical(perfect=False), distribution] if distribution.shape[1] > 1 else []


@cache
def _stream() -> Any:
    # Not at the top: every command would wait for it.
    from constriction import stream

    return stream
