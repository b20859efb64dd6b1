"""Ids coded without a look at their neighbours: all alike, or by how often each occurs in this file.

Images of a chunk are one stream, level after level. With packets every packet is a stream of its own, and readable without the others.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from genkit.codec.damaged import DamagedError
from genkit.codec.lanes import split
from genkit.codec.stream import Decoder, Encoder, Ints, Shared, num_raw, to_ids, to_number


class Memoryless:
    """The priors "uniform" and "static".

    Args:
        weights: [Q, S], how probable each id of each level is, in whole numbers of any unit; [1, S] for all levels alike.
        kind, table: what the file says of this prior.
    """

    def __init__(self, weights: NDArray[np.float64], kind: str, table: bytes):
        self.kind, self.table = kind, table
        self._codebook_size = weights.shape[1]
        self._rows = [Shared(row) for row in weights]

    def encode(self, images: Sequence[Ints], packets: str) -> list[bytes]:
        """ids [Q, *grid] of the images of a chunk -> its lanes: one for all, or the packets of one image after another."""
        flat = [ids.reshape(len(ids), -1) for ids in images]
        if packets == "none":
            return [self._encode(np.concatenate(flat, 1), 0)]
        cuts = {ids.shape[1:]: _cut(ids.shape[1:], packets) for ids in images}
        lanes = []
        for ids, image in zip(flat, images, strict=True):
            order, bounds = cuts[image.shape[1:]]
            ordered = ids[:, order].astype(np.int32)
            lanes += [self._encode(ordered[:, a:b], num_raw(self._codebook_size, b - a)) for a, b in bounds]
        return lanes

    def decode(
        self, lanes: Sequence[bytes | None], grids: Sequence[tuple[int, ...]], packets: str, num_levels: int
    ) -> list[Ints]:
        """The inverse; ids of lanes that are None come out as -1. Raises DamagedError for bytes that no encoder wrote, unless there are
        packets: then such a lane counts as lost."""
        ends = list(accumulate(map(math.prod, grids), initial=0))
        whole = np.full((num_levels, ends[-1]), -1, np.int64)
        if packets == "none":
            (lane,) = lanes
            assert lane is not None
            self._decode(lane, 0, whole)
        cuts = {grid: _cut(grid, packets) for grid in grids}
        images, left = [], iter(lanes)
        for (first, last), grid in zip(pairwise(ends), grids, strict=True):
            ids = whole[:, first:last]
            if packets != "none":
                order, bounds = cuts[grid]
                ordered = np.full_like(ids, -1)
                for a, b in bounds:
                    if (lane := next(left)) is not None:
                        self._decode_packet(lane, ordered[:, a:b])
                ids[:, order] = ordered
            images.append(ids.reshape(num_levels, *grid))
        return images

    def _encode(self, ids: NDArray[np.integer], raw: int) -> bytes:
        """ids [Q, n] -> a stream that begins at the last `raw` ids of the last level."""
        coded = ids.shape[1] - raw
        encoder = Encoder(to_number(ids[-1, coded:], self._codebook_size))
        encoder.push(ids[-1, :coded], self._rows[-1])
        for q in reversed(range(len(ids) - 1)):
            encoder.push(ids[q], self._rows[min(q, len(self._rows) - 1)])
        return encoder.to_bytes()

    def _decode(self, lane: bytes, raw: int, ids: Ints) -> None:
        """The inverse, into ids."""
        decoder, count = Decoder(lane), ids.shape[1]
        for q in range(len(ids) - 1):
            ids[q] = decoder.pop(count, self._rows[min(q, len(self._rows) - 1)])
        ids[-1, : count - raw] = decoder.pop(count - raw, self._rows[-1])
        ids[-1, count - raw :] = to_ids(decoder.rest(), raw, self._codebook_size)

    def _decode_packet(self, lane: bytes, ids: Ints) -> None:
        try:
            self._decode(lane, num_raw(self._codebook_size, ids.shape[1]), ids)
        except DamagedError:
            ids[:] = -1  # damage that a packet's checksum missed


def _cut(grid: tuple[int, ...], packets: str) -> tuple[Ints, list[tuple[int, int]]]:
    """The positions of an image, packet after packet, and where each begins and ends."""
    parts = split(grid, packets)
    return np.concatenate(parts), list(pairwise(accumulate(map(len, parts), initial=0)))


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


def _unpack(table: bytes, num_levels: int, codebook_size: int) -> NDArray[np.float64]:
    size = num_levels * codebook_size
    try:
        unpacker = zlib.decompressobj(-15)
        stored = np.frombuffer(unpacker.decompress(table[1:], size + 1), np.uint8)
        values = _rounded(table[0]) if table[0] < 4 else np.zeros(0, np.int64)
        if len(stored) != size or not unpacker.eof or stored.max() >= len(values):
            raise ValueError
        weights = values[stored].reshape(num_levels, codebook_size).astype(np.float64)
        if not (0 < weights.sum(1)).all():
            raise ValueError
    except (ValueError, IndexError, zlib.error):
        raise DamagedError("has a damaged table of how often each id occurs") from None
    return weights
