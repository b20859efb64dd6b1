"""Images in the places where people have them."""

import io
import struct
import zipfile
import zlib

import numpy as np
from PIL import Image

SIDE = 28


def pixels_of(count, channels=1, side=SIDE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def png(array, **options):
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(buffer, format="PNG", **options)
    return buffer.getvalue()


def png16(colour_type, channels, value=0x1234, side=SIDE):
    """A 16-bit PNG of one value, which Pillow itself cannot write in colour."""
    row = b"\0" + struct.pack(">H", value) * (side * channels)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 16, colour_type, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(row * side)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def named(pixels, classes=3):
    """name -> bytes, sorted by name, in subfolders called like class numbers."""
    return dict(sorted((f"{i % classes}/{i:03d}.png", png(image)) for i, image in enumerate(pixels)))


def folder_of(path, members):
    for name, data in members.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def zip_of(path, members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def in_order(pixels, classes=3):
    order = sorted(range(len(pixels)), key=lambda i: (i % classes, i))
    return pixels[order], np.array([i % classes for i in order])
