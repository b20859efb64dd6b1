"""What every reader returns: positions, and polygons of any number of corners, not yet checked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Polygons:
    """Args:
    vertices: [V, 3] float64.
    corners: [sum of sizes] int64, rows of `vertices`, polygon after polygon.
    sizes: [polygons] int64, at least 3 each.
    """

    vertices: np.ndarray
    corners: np.ndarray
    sizes: np.ndarray

    def triangles(self) -> np.ndarray:
        """[F, 3]: every polygon as a fan around its first corner, in order."""
        first = np.cumsum(self.sizes) - self.sizes
        each = self.sizes - 2
        start = np.repeat(first, each)
        step = np.arange(each.sum()) - np.repeat(np.cumsum(each) - each, each)
        return np.stack([self.corners[start], self.corners[start + step + 1], self.corners[start + step + 2]], 1)


def of_triangles(vertices: np.ndarray, faces: np.ndarray) -> Polygons:
    """From faces [F, 3]."""
    return Polygons(vertices.astype(np.float64), faces.reshape(-1).astype(np.int64), np.full(len(faces), 3, np.int64))


def positions(words: list[bytes]) -> np.ndarray:
    """[V, 3] float64 from the words of a text file, three for each. Raises ValueError for one that is no number."""
    try:
        return np.array(words, np.float64).reshape(-1, 3)
    except ValueError as error:
        raise ValueError(f"a vertex that is no number ({error})") from None


def whole(word: bytes) -> int:
    """The number of a corner from a word of a text file. Raises ValueError for what is no whole number."""
    try:
        return int(word)
    except ValueError:
        raise ValueError(f"a face names {word[:40].decode('latin-1')!r}, which is no whole number") from None
