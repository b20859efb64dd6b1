"""Wavefront OBJ: lines of text.

Read are positions and faces; normals, textures, materials, groups, curves and lines (faces of two corners too) are passed over.
"""

from __future__ import annotations

import numpy as np

from genkit.meshes.formats.polygons import Polygons, positions


def read(data: bytes) -> Polygons:
    """Raises ValueError naming the line."""
    numbers: list[bytes] = []
    corners: list[int] = []
    sizes: list[int] = []
    count = 0
    # A byte order mark is no part of the first word; lines end as on any system, go on behind a backslash, and may end in a comment.
    text = data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\\\n", b" ")
    for at, line in enumerate(text.split(b"\n"), 1):
        words = line.partition(b"#")[0].split()
        if not words:
            continue
        if words[0] == b"v":
            if len(words) < 4:
                raise ValueError(f"line {at}: a vertex of {len(words) - 1} numbers")
            numbers += words[1:4]
            count += 1
        elif words[0] == b"f":
            try:
                # a, a/texture, a//normal or a/texture/normal; below 0 = counted from the last vertex so far
                named = [int(word.split(b"/", 1)[0]) for word in words[1:]]
            except ValueError:
                raise ValueError(f"line {at}: a face names no numbers: {line[:60].decode('latin-1')!r}") from None
            if len(named) < 3:  # a point or a line, as exporters write them
                continue
            if 0 in named:
                raise ValueError(f"line {at}: a face names vertex 0; they are counted from 1")
            corners += [n - 1 if n > 0 else count + n for n in named]
            sizes.append(len(named))
    return Polygons(positions(numbers), np.array(corners, np.int64), np.array(sizes, np.int64))


def write(vertices: np.ndarray, faces: np.ndarray) -> bytes:
    """[V, 3] float32 and [F, 3] -> the file; nine digits give every float32 back."""
    lines = ["# genkit"]
    lines += [f"v {x:.9g} {y:.9g} {z:.9g}" for x, y, z in vertices.tolist()]
    lines += [f"f {a} {b} {c}" for a, b, c in (faces + 1).tolist()]
    return ("\n".join(lines) + "\n").encode()
