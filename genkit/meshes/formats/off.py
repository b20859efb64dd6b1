"""OFF: counts, positions, polygons; with or without colours (COFF), which are passed over. Text only."""

from __future__ import annotations

import re

import numpy as np

from genkit.meshes.formats.polygons import Polygons, positions, whole


def read(data: bytes) -> Polygons:
    """Raises ValueError for another file, and for counts that the file does not hold."""
    head = re.match(rb"\s*(?:#[^\n]*\n\s*)*(ST)?(C)?(N)?OFF(?![A-Za-z])", data)
    if not head:
        raise ValueError("it does not begin with OFF")
    if b"BINARY" in data[:40]:
        raise ValueError("a binary OFF; only text is read")
    # Some writers put the counts right behind the word, even without a space (ModelNet).
    lines = [line.split(b"#", 1)[0].split() for line in data[head.end() :].splitlines()]
    rows = iter([line for line in lines if line])
    try:
        num_vertices, num_faces = map(int, next(rows)[:2])
    except (StopIteration, ValueError):
        raise ValueError("no counts of vertices and faces behind OFF") from None
    if num_vertices < 0 or num_faces < 0 or num_vertices + num_faces > len(lines):
        raise ValueError(
            f"its head promises {num_vertices:,} vertices and {num_faces:,} faces, the file has {len(lines):,} lines"
        )
    try:
        # Positions come first in every kind, what else a vertex has behind them.
        numbers = [next(rows)[:3] for _ in range(num_vertices)]
        if short := next((row for row in numbers if len(row) < 3), None):
            raise ValueError(f"a vertex of {len(short)} numbers")
        vertices = positions([number for row in numbers for number in row])
        corners: list[int] = []
        sizes = []
        for _ in range(num_faces):
            row = next(rows)
            size = whole(row[0])
            if size < 3 or len(row) < size + 1:
                raise ValueError(f"a face of {size} corners in a line of {len(row) - 1} numbers")
            corners += map(whole, row[1 : size + 1])
            sizes.append(size)
    except (StopIteration, RuntimeError):
        raise ValueError(f"it ends before its {num_vertices:,} vertices and {num_faces:,} faces do") from None
    return Polygons(vertices, np.array(corners, np.int64), np.array(sizes, np.int64))


def write(vertices: np.ndarray, faces: np.ndarray) -> bytes:
    """[V, 3] float32 and [F, 3] -> the file."""
    lines = ["OFF", f"{len(vertices)} {len(faces)} 0"]
    lines += [f"{x:.9g} {y:.9g} {z:.9g}" for x, y, z in vertices.tolist()]
    lines += [f"3 {a} {b} {c}" for a, b, c in faces.tolist()]
    return ("\n".join(lines) + "\n").encode()
