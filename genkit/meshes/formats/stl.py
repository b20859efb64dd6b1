"""STL, binary and text: triangles without shared vertices. Positions that are equal bit for bit become one vertex later."""

from __future__ import annotations

import re

import numpy as np

from genkit.meshes.formats.polygons import Polygons, of_triangles, positions

_RECORD = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])


def read(data: bytes) -> Polygons:
    """Raises ValueError for a length that does not fit the count in the head, and for text that is no STL."""
    count = int.from_bytes(data[80:84], "little") if len(data) >= 84 else -1
    # Binary files may begin with "solid" too: the length decides.
    if count >= 0 and len(data) == 84 + count * _RECORD.itemsize:
        corners = np.frombuffer(data, _RECORD, count, 84)["corners"].reshape(-1, 3)
    elif data[:512].removeprefix(b"\xef\xbb\xbf").lstrip()[:5].lower() == b"solid" and re.search(
        rb"(?i)facet|endsolid", data
    ):
        corners = _text(data)
    elif count >= 0:
        raise ValueError(
            f"its head promises {count:,} triangles, {84 + count * _RECORD.itemsize:,} bytes; the file has {len(data):,} bytes"
        )
    else:
        raise ValueError(f"{len(data)} bytes are no STL")
    return of_triangles(corners, np.arange(len(corners)).reshape(-1, 3))


def _text(data: bytes) -> np.ndarray:
    found = re.findall(rb"(?i)vertex\s+(\S+)\s+(\S+)\s+(\S+)", data)
    if len(found) % 3 or len(found) != 3 * len(re.findall(rb"(?i)\bouter\s+loop\b", data)):
        raise ValueError(f"{len(found)} vertices are not three for each facet; the file may be cut short")
    return positions([number for vertex in found for number in vertex])


def write(vertices: np.ndarray, faces: np.ndarray) -> bytes:
    """[V, 3] float32 and [F, 3] -> the binary file."""
    corners = vertices[faces]  # [F, 3, 3]
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    records = np.zeros(len(faces), _RECORD)
    records["corners"] = corners
    records["normal"] = cross / np.maximum(np.linalg.norm(cross, axis=1, keepdims=True), 1e-30)
    return b"genkit".ljust(80, b" ") + len(faces).to_bytes(4, "little") + records.tobytes()
