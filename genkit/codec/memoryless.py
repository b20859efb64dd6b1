"""Ids coded without a look at their neighbours: all alike, or by how often each occurs in this file. Every lane stands alone."""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from genkit.codec import ans
from genkit.codec.damaged import DamagedError
from genkit.codec.lanes import split
from genkit.codec.tables import Ints, Tables, Whole, max_total, precision_of

_SYMBOLS_AT_ONCE = 2**21


class Memoryless:
    """The priors "uniform" and "static".

    Args:
        weights: [Q, S] whole numbers, how probable each id of each level is, in any unit; [1, S] for all levels alike.
        kind, table: what the file says of this prior.
    """

    def __init__(self, weights: Whole, kind: str, table: bytes):
        self.kind, self.table = kind, table
        self._last_row = len(weights) - 1
        self._tables = Tables(weights, precision_of(weights.shape[1]))

    def encode(self, images: Sequence[Ints], packets: str) -> list[list[bytes]]:
        """ids [Q, *grid] of each image -> its lanes."""
        whole = [
            (i, part, ids.reshape(len(ids), -1)[:, part])
            for i, ids in enumerate(images)
            for part in split(ids.shape[1:], packets)
        ]
        done: list[bytes] = [b""] * len(whole)
        for chosen in _alike([ids.shape for _, _, ids in whole]):
            symbols = np.stack([whole[i][2] for i in chosen])  # [N, Q, n]
            levels = np.broadcast_to(np.arange(symbols.shape[1]).clip(max=self._last_row)[:, None], symbols.shape)
            start, freq = (x.reshape(len(chosen), -1).T for x in self._tables.intervals(levels, symbols))
            for i, lane in zip(chosen, ans.encode(start, freq, [self._tables.precision] * len(start)), strict=True):
                done[i] = lane
        lanes: list[list[bytes]] = [[] for _ in images]
        for (image, _, _), lane in zip(whole, done, strict=True):
            lanes[image].append(lane)
        return lanes

    def decode(
        self, lanes: Sequence[Sequence[bytes | None]], grids: Sequence[tuple[int, ...]], packets: str, num_levels: int
    ) -> list[Ints]:
        """The inverse; ids of lanes that are None come out as -1. Raises DamagedError for bytes that no encoder wrote, unless there are
        packets: then such a lane counts as lost."""
        images = [np.full((num_levels, math.prod(grid)), -1, np.int64) for grid in grids]
        whole = [
            (image, part, lane)
            for image, grid, own in zip(images, grids, lanes, strict=True)
            for part, lane in zip(split(grid, packets), own, strict=True)
            if lane is not None
        ]
        for chosen in _alike([(num_levels, len(part)) for _, part, _ in whole]):
            decoder = ans.Decoder([whole[i][2] for i in chosen])
            found = np.empty((len(chosen), num_levels, len(whole[chosen[0]][1])), np.int64)  # [N, Q, n]
            for q in range(num_levels):
                level = np.full(len(chosen), min(q, self._last_row))
                for t in range(found.shape[2]):
                    symbols = self._tables.find(level, decoder.slots(self._tables.precision))
                    found[:, q, t] = symbols
                    decoder.advance(*self._tables.intervals(level, symbols), self._tables.precision)
            is_complete = decoder.is_complete()
            if packets == "none" and not is_complete.all():
                raise DamagedError("holds ids that do not end where they should; the file is damaged")
            for i, ids, is_good in zip(chosen, found, is_complete, strict=True):
                image, part, _ = whole[i]
                image[:, part] = ids if is_good else -1  # damage that a packet's checksum missed
        return [image.reshape(num_levels, *grid) for image, grid in zip(images, grids, strict=True)]


def _alike(shapes: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """Numbers of lanes with as many ids each, which are coded side by side; never more than memory is good for."""
    same: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, shape in enumerate(shapes):
        same[shape].append(i)
    for (Q, n), members in same.items():
        step = max(1, _SYMBOLS_AT_ONCE // (Q * n))
        yield from (members[first : first + step] for first in range(0, len(members), step))


def uniform(codebook_size: int) -> Memoryless:
    """Every id as probable as every other: log2 S bits each."""
    return Memoryless(np.ones((1, codebook_size)), "uniform", b"")


def static(images: Sequence[Ints], codebook_size: int) -> Memoryless:
    """By the counts of these ids, which go into the file: rounded as coarsely as makes table and lanes together the smallest."""
    num_levels = len(images[0])
    counts = sum(
        np.stack([np.bincount(level.ravel(), minlength=codebook_size) for level in ids]).astype(np.int64)
        for ids in images
    )
    assert isinstance(counts, np.ndarray)
    best: tuple[float, bytes] | None = None
    for mantissa_bits in range(4):
        table = _pack(counts, mantissa_bits)
        weights = _unpack(table, num_levels, codebook_size)
        share = np.where(counts > 0, weights, 1) / weights.sum(1, keepdims=True)
        bits = 8 * len(table) - float((counts * np.log2(share)).sum())  # an estimate; nothing is decoded by it
        if best is None or bits < best[0]:
            best = bits, table
    assert best is not None
    return read_static(best[1], num_levels, codebook_size)


def read_static(table: bytes, num_levels: int, codebook_size: int) -> Memoryless:
    """The prior whose `table` this is. Raises DamagedError for a table that is none."""
    return Memoryless(_unpack(table, num_levels, codebook_size), "static", table)


def _rounded(mantissa_bits: int) -> Ints:
    """The counts a table can hold, in rising order: small ones exactly, larger ones with a few binary digits."""
    steps = 1 << mantissa_bits
    return np.array([m if e == 0 else (steps + m) << (e - 1) for e in range(26) for m in range(steps)], np.int64)[:256]


def _pack(counts: Ints, mantissa_bits: int) -> bytes:
    values = _rounded(mantissa_bits)
    nearest = np.searchsorted((values[1:] + values[:-1]) / 2, counts)
    # No count that occurs may become 0, or the others would be told too large a share of the whole.
    nearest = np.maximum(nearest, counts > 0).astype(np.uint8)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return bytes([mantissa_bits]) + packer.compress(nearest.tobytes()) + packer.flush()


def _unpack(table: bytes, num_levels: int, codebook_size: int) -> Whole:
    size = num_levels * codebook_size
    try:
        unpacker = zlib.decompressobj(-15)
        stored = np.frombuffer(unpacker.decompress(table[1:], size + 1), np.uint8)
        values = _rounded(table[0]) if table[0] < 4 else np.zeros(0, np.int64)
        if len(stored) != size or not unpacker.eof or stored.max() >= len(values):
            raise ValueError
        weights = values[stored].reshape(num_levels, codebook_size).astype(np.float64)
        if not (0 < weights.sum(1)).all() or (weights.sum(1) > max_total(precision_of(codebook_size))).any():
            raise ValueError
    except (ValueError, IndexError, zlib.error):
        raise DamagedError("has a damaged table of how often each id occurs") from None
    return weights
