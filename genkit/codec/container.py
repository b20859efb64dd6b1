"""The bytes of a .gtk file: who can read it, what images are in it, where each lane lies, and checksums over all of it.

    "\\x89GTK"  version (1 byte)  length of the header (4 bytes)  header  crc32 of everything so far (4 bytes)  payload

Header, numbers as LEB128 unless a width is given: fingerprint of the tokenizer (8 bytes), levels, codebook size, checksum of a clustered codebook
(a count, 0 or 4, and as many bytes), prior and packets (1 byte each), the prior's table, names, runs of equally large images, lengths of lanes,
crc32 of each chunk. A table, names and lengths are deflated. Payload: the lanes, one after another. Integers are little-endian.

A chunk is a run of images of at most 2^18 ids and is checked as a whole when one of them is read; with packets every lane has a CRC-16 of its own
and its number instead, and a lane that is damaged, missing or another's is `None`, not an error (of random bytes one in 2^16 passes). Nothing is allocated on the word of a file alone: every length is held
against the bytes that are there and against the limits below. Ids that say nothing take no bytes, so a file that would claim more than 2^11 ids
a byte is filled up with zeros.
"""

from __future__ import annotations

import binascii
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

import numpy as np

from genkit.codec import lanes
from genkit.codec.damaged import DamagedError
from genkit.codec.stream import MAX_SYMBOLS
from genkit.errors import GenkitError

MAGIC = b"\x89GTK"
VERSION = 2
SUFFIX = ".gtk"
PRIORS = ("uniform", "static", "adaptive", "model")
MAX_IMAGES, MAX_LEVELS, MAX_AXES, MAX_SIDE = 2**20, 64, 3, 2**16
MAX_IDS = 2**18  # of an image, and of a chunk
MAX_NAMES, MAX_LANES = 2**26, 2**24  # bytes; lanes in all
MAX_PER_BYTE = 2**11  # ids a file may claim for every byte of it

_START = struct.Struct("<4sBI")
_CRC = struct.Struct("<I")


@dataclass(frozen=True)
class Header:
    """Everything about a file but its ids.

    Args:
        fingerprint: 8 bytes of the tokenizer's.
        num_levels, codebook_size: Q and S of the ids in the file.
        clusters: checksum of a clustered codebook (see genkit.codec.rate), empty = the tokenizer's own.
        prior, table: the word for it and what it needs to know beside the tokenizer.
        packets: how images are split into lanes (see genkit.codec.lanes).
        names: one per image, with "/" between folders.
        sizes: (Y, X) in pixels of each image as it was before padding.
        grids: of each image's ids.
    """

    fingerprint: bytes
    num_levels: int
    codebook_size: int
    clusters: bytes
    prior: str
    table: bytes
    packets: str
    names: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    grids: tuple[tuple[int, ...], ...]

    def chunks(self) -> list[range]:
        """Images that are coded and checked together."""
        return chunks(self.grids, self.num_levels)

    def num_ids(self) -> int:
        """Of all images together."""
        return self.num_levels * sum(map(math.prod, self.grids))

    def num_lanes(self, chunk: range) -> int:
        """Stretches of bytes that are decoded by themselves: packets, or a few images for the prior "model", or the chunk."""
        if self.packets != "none":
            return sum(lanes.count(self.grids[i], self.packets) for i in chunk)
        return -(-len(chunk) // lanes.STREAM_IMAGES) if self.prior == "model" else 1


def chunks(grids: Sequence[tuple[int, ...]], num_levels: int) -> list[range]:
    """Numbers of images in runs of at most MAX_IDS ids."""
    found, first, ids = [], 0, 0
    for i, grid in enumerate(grids):
        own = num_levels * math.prod(grid)
        if i > first and ids + own > MAX_IDS:
            found.append(range(first, i))
            first, ids = i, 0
        ids += own
    return [*found, range(first, len(grids))]


class File:
    """A file that was read: its header, and the lanes of any chunk. Make one with `read`."""

    def __init__(self, header: Header, name: str, payload: bytes, lengths: list[int], checksums: list[int]):
        self.header, self.name = header, name
        self._payload, self._checksums = payload, checksums
        self.payload_size = sum(lengths)
        self._bounds = list(accumulate(lengths, initial=0))
        self.chunks = header.chunks()
        self._first_lane = list(accumulate(map(header.num_lanes, self.chunks), initial=0))

    def lanes(self, number: int) -> list[bytes | None]:
        """The lanes of a chunk; None = a packet that was lost. Raises DamagedError naming the images of a damaged chunk."""
        first, last = self._first_lane[number], self._first_lane[number + 1]
        pieces = [self._payload[a:b] for a, b in pairwise(self._bounds[first : last + 1])]
        if self.header.packets != "none":
            return [_open_packet(i, piece) for i, piece in enumerate(pieces, first)]
        stretch = self._payload[self._bounds[first] : self._bounds[last]]
        if zlib.crc32(stretch) != self._checksums[number]:
            missing = self._bounds[last] - self._bounds[first] - len(stretch)
            what = f"truncated ({missing} bytes are missing)" if missing else "damaged"
            images = self.chunks[number]
            names = f"{self.header.names[images[0]]} to {self.header.names[images[-1]]}" if len(images) > 1 else ""
            raise DamagedError(
                f"is {what} in the ids of {names or self.header.names[images[0]]}; copy or encode the file again"
            )
        return list(pieces)


def write(header: Header, chunk_lanes: Sequence[Sequence[bytes]]) -> bytes:
    """The bytes of a file.

    Args:
        chunk_lanes: the header.num_lanes lanes of each of header.chunks(), image after image, and packet after packet within.
    """
    if header.packets != "none":
        first = accumulate(map(len, chunk_lanes), initial=0)
        chunk_lanes = [
            [_packet(i, lane) for i, lane in enumerate(some, start)]
            for start, some in zip(first, chunk_lanes, strict=False)
        ]
    payload = [b"".join(some) for some in chunk_lanes]
    lengths = [len(lane) for some in chunk_lanes for lane in some]
    body = bytearray(header.fingerprint)
    body += _numbers(header.num_levels, header.codebook_size, len(header.clusters)) + header.clusters
    body += bytes([PRIORS.index(header.prior), lanes.PACKETS.index(header.packets)])
    body += _numbers(len(header.table)) + header.table
    body += _deflate("\0".join(header.names).encode("utf-8", "surrogateescape"))
    runs = [(key, len(list(same))) for key, same in groupby(zip(header.sizes, header.grids, strict=True))]
    body += _numbers(len(runs))
    for (size, grid), count in runs:
        body += _numbers(count, *size, len(grid), *grid)
    width = next(w for w in (1, 2, 4) if max(lengths, default=0) < 1 << (8 * w))
    body += bytes([width]) + _deflate(np.array(lengths, f"<u{width}").tobytes())
    if header.packets == "none":
        body += b"".join(_CRC.pack(zlib.crc32(some)) for some in payload)
    start = _START.pack(MAGIC, VERSION, len(body)) + bytes(body)
    data = start + _CRC.pack(zlib.crc32(start)) + b"".join(payload)
    return data + bytes(_num_zeros(header, len(data)))


def _num_zeros(header: Header, size: int) -> int:
    """Zero bytes behind a file of `size` bytes."""
    return max(0, -(-header.num_ids() // MAX_PER_BYTE) - size)


def read(data: bytes, name: str = "the codes") -> File:
    """A file from its bytes.

    Args:
        name: of the file, for messages.

    Raises: GenkitError in one line for anything that `write` did not make: another format, a newer version, truncated, damaged. A damaged
        payload is found when its chunk is asked for.
    """
    try:
        return _read(data, name)
    except DamagedError as error:
        raise GenkitError(f"{name} {error}") from None


def _read(data: bytes, name: str) -> File:
    again = "copy or encode the file again"
    if len(data) < _START.size or data[:4] != MAGIC:
        is_cut = data and (MAGIC.startswith(data[:4]) or data[:4] == MAGIC)
        raise DamagedError(
            f"is truncated in its header; {again}"
            if is_cut
            else "is no codes file of `genkit encode` (it begins otherwise)"
        )
    _, version, length = _START.unpack_from(data)
    if version != VERSION:
        cure = "update genkit" if version > VERSION else "encode the images again, or decode with the genkit that did"
        raise DamagedError(f"has format version {version}, this genkit reads {VERSION}; {cure}")
    end = _START.size + length
    if len(data) < end + _CRC.size:
        raise DamagedError(f"is truncated in its header: {end + _CRC.size - len(data)} bytes are missing; {again}")
    if zlib.crc32(data[:end]) != _CRC.unpack_from(data, end)[0]:
        raise DamagedError(f"has a damaged header; {again}")
    reader = _Reader(data[_START.size : end])
    header = _read_header(reader)
    numbers = header.chunks()
    count = sum(map(header.num_lanes, numbers))
    if count > MAX_LANES:
        raise DamagedError(f"claims {count} lanes; at most {MAX_LANES} are read")
    width = reader.take(1)[0]
    stored = reader.inflate(4 * MAX_LANES)
    if width not in (1, 2, 4) or len(stored) != width * count:
        raise DamagedError("has a header that contradicts itself: lengths and images differ in number")
    lengths = np.frombuffer(stored, f"<u{width}").tolist()
    checksums = [] if header.packets != "none" else [_CRC.unpack(reader.take(4))[0] for _ in numbers]
    if reader.left:
        raise DamagedError("has a header that is longer than it should be")
    payload, size = data[end + _CRC.size :], sum(lengths)
    whole = size + _num_zeros(header, end + _CRC.size + size)
    if len(payload) > whole:
        raise DamagedError(f"has {len(payload) - whole} bytes too many at its end; {again}")
    # Some chunks, or packets, may still be there.
    is_useless = header.packets == "none" and len(numbers) == 1
    if len(payload) < whole and (is_useless or header.num_ids() > MAX_PER_BYTE * len(data)):
        raise DamagedError(f"is truncated: {whole - len(payload)} bytes are missing; {again}")
    if any(payload[size:]):
        raise DamagedError(f"is damaged at its end; {again}")
    return File(header, name, payload, lengths, checksums)


def _read_header(reader: _Reader) -> Header:
    fingerprint = reader.take(8)
    num_levels = reader.number(MAX_LEVELS, at_least=1)
    codebook_size = reader.number(MAX_SYMBOLS, at_least=1)
    clusters = reader.take(reader.number(4))
    prior, packets = reader.take(2)
    if prior >= len(PRIORS) or packets >= len(lanes.PACKETS) or len(clusters) not in (0, 4):
        raise DamagedError("has a header with words this genkit does not know; update genkit")
    if packets and PRIORS[prior] in ("adaptive", "model"):
        raise DamagedError("has a header that contradicts itself: packets, and a prior that needs all of them")
    table = reader.take(reader.number(reader.left))
    joined = reader.inflate(MAX_NAMES)
    if joined.count(b"\0") >= MAX_IMAGES:
        raise DamagedError(f"claims more than {MAX_IMAGES} images")
    names = tuple(joined.decode("utf-8", "surrogateescape").split("\0"))
    sizes: list[tuple[int, int]] = []
    grids: list[tuple[int, ...]] = []
    for _ in range(reader.number(reader.left)):
        count = reader.number(MAX_IMAGES - len(sizes), at_least=1)
        size = (reader.number(MAX_SIDE, at_least=1), reader.number(MAX_SIDE, at_least=1))
        grid = tuple(reader.number(MAX_IDS, at_least=1) for _ in range(reader.number(MAX_AXES, at_least=1)))
        if num_levels * math.prod(grid) > MAX_IDS:
            raise DamagedError(f"claims {num_levels} x {grid} ids in an image; at most {MAX_IDS} are read")
        if len(sizes) + count > len(names):
            break
        sizes += [size] * count
        grids += [grid] * count
    if not sizes or len(sizes) != len(names):
        raise DamagedError("has a header that contradicts itself: names and images differ in number")
    return Header(
        fingerprint,
        num_levels,
        codebook_size,
        clusters,
        PRIORS[prior],
        table,
        lanes.PACKETS[packets],
        names,
        tuple(sizes),
        tuple(grids),
    )


class _Reader:
    """Takes a header apart and never past its end."""

    def __init__(self, data: bytes):
        self._data, self._at = data, 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise DamagedError("has a header that ends too early")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, at_most: int, at_least: int = 0) -> int:
        value, shift = 0, 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
            if shift > 35:
                raise DamagedError("has a header with a number of too many digits")
        if not at_least <= value <= at_most:
            raise DamagedError(f"has a header with {value} where {at_least} to {at_most} is possible")
        return value

    def inflate(self, limit: int) -> bytes:
        packed = self.take(self.number(self.left))
        unpacker = zlib.decompressobj(-15)
        try:
            data = unpacker.decompress(packed, limit + 1)
        except zlib.error:
            raise DamagedError("has a header with a deflated part that cannot be read") from None
        if len(data) > limit or not unpacker.eof or unpacker.unused_data:
            raise DamagedError("has a header with a deflated part that does not end where it should")
        return data


def _numbers(*values: int) -> bytes:
    """LEB128: seven bits a byte, the lowest first, the top bit set on all but the last."""
    out = bytearray()
    for value in values:
        while value >= 0x80:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)
    return bytes(out)


def _deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    packed = packer.compress(data) + packer.flush()
    return _numbers(len(packed)) + packed


def _packet(number: int, lane: bytes) -> bytes:
    return _packet_crc(number, lane) + lane


def _open_packet(number: int, piece: bytes) -> bytes | None:
    """What is in a packet, or None where it is not what was sent."""
    return piece[2:] if len(piece) >= 2 and piece[:2] == _packet_crc(number, piece[2:]) else None


def _packet_crc(number: int, lane: bytes) -> bytes:
    """Of a lane and its place in the file: bytes missing before it must not let it pass for its neighbour."""
    return binascii.crc_hqx(lane, binascii.crc_hqx(number.to_bytes(4, "little"), 0xFFFF)).to_bytes(2, "little")
