"""PLY, text and binary of both byte orders. Read are x, y, z and the polygons; other properties and elements are passed over."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from genkit.meshes.formats.polygons import Polygons

_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2", "uint16": "u2",
    "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip
_INDICES = ("vertex_indices", "vertex_index")


@dataclass
class _Element:
    name: str
    count: int
    # (name, type) of plain properties, (name, (type of the length, type of the items)) of lists
    properties: list[tuple[str, str | tuple[str, str]]] = field(default_factory=list)


def read(data: bytes) -> Polygons:
    """Raises ValueError for a head that is none, that promises what the file does not hold, or that has no positions."""
    elements, form, start = _head(data)
    body: _Text | _Binary = (
        _Text(data[start:]) if form == "ascii" else _Binary(data[start:], "<" if "little" in form else ">")
    )
    vertices: np.ndarray | None = None
    corners, sizes = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for element in elements:
        names = [name for name, _ in element.properties]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"its head names {twice} of {element.name} twice")
        lists = {name for name, kind in element.properties if not isinstance(kind, str)}
        columns = body.take(element)
        if element.name == "vertex":
            missing = [axis for axis in "xyz" if axis not in columns or axis in lists]
            if missing:
                raise ValueError(f"its vertices have no {', '.join(missing)}")
            vertices = np.stack([columns[axis] for axis in "xyz"], 1).astype(np.float64)
        elif element.name == "face":
            named = next((columns[name] for name in _INDICES if name in lists), None)
            if named is None:
                raise ValueError(f"its faces have no {' or '.join(_INDICES)}")
            corners, sizes = named
    if vertices is None:
        raise ValueError("its head names no vertices")
    if len(sizes) and sizes.min() < 3:
        raise ValueError(f"a face of {sizes.min()} corners")
    return Polygons(vertices, corners, sizes)


def _head(data: bytes) -> tuple[list[_Element], str, int]:
    end = data.find(b"end_header")
    if not data.startswith(b"ply") or end < 0:
        raise ValueError("it has no PLY head (ply ... end_header)")
    newline = data.find(b"\n", end)
    start = len(data) if newline < 0 else newline + 1
    elements: list[_Element] = []
    form = ""
    for line in data[:end].decode("latin-1").splitlines()[1:]:
        words = line.split()
        try:
            if not words or words[0] in ("comment", "obj_info"):
                continue
            if words[0] == "format":
                form = words[1]
            elif words[0] == "element":
                elements.append(_Element(words[1], int(words[2])))
                if elements[-1].count < 0:
                    raise ValueError
            elif words[0] == "property" and words[1] == "list":
                elements[-1].properties.append((words[4], (_TYPES[words[2]], _TYPES[words[3]])))
            elif words[0] == "property":
                elements[-1].properties.append((words[2], _TYPES[words[1]]))
            else:
                raise ValueError
        except (IndexError, KeyError, ValueError):
            raise ValueError(f"a line of its head makes no sense: {line!r}") from None
    if form not in ("ascii", "binary_little_endian", "binary_big_endian"):
        raise ValueError(
            f"its format is {form or 'not named'}; ascii, binary_little_endian and binary_big_endian are read"
        )
    return elements, form, start


def _length(found: bytes | np.generic, element: _Element) -> int:
    try:
        return int(found)
    except (ValueError, OverflowError):
        shown = found[:40].decode("latin-1") if isinstance(found, bytes) else found
        raise ValueError(f"a list of {shown} items in {element.name}") from None


def _promised(element: _Element, held: str) -> ValueError:
    return ValueError(f"its head promises {element.count:,} of {element.name}, but {held}")


class _Text:
    def __init__(self, data: bytes) -> None:
        self._words = data.split()
        self._at = 0

    def take(self, element: _Element) -> dict[str, np.ndarray | tuple[np.ndarray, np.ndarray]]:
        """name -> [count] numbers, or the items of a list and their counts."""
        left = len(self._words) - self._at
        if element.count * max(1, len(element.properties)) > left:
            raise _promised(element, f"the file has {left:,} more numbers")
        try:
            if all(isinstance(kind, str) for _, kind in element.properties):
                width = len(element.properties)
                words = self._words[self._at : self._at + element.count * width]
                self._at += len(words)
                table = np.array(words, np.float64).reshape(element.count, width)
                return {name: table[:, i] for i, (name, _) in enumerate(element.properties)}
            plain: dict[str, list] = {name: [] for name, _ in element.properties}
            lengths: dict[str, list[int]] = {name: [] for name, _ in element.properties}
            for _ in range(element.count):
                for name, kind in element.properties:
                    count = 1
                    if not isinstance(kind, str):
                        count = _length(self._words[self._at], element)
                        lengths[name].append(count)
                        self._at += 1
                    if count < 0 or self._at + count > len(self._words):
                        raise _promised(element, "the file ends before")
                    plain[name] += self._words[self._at : self._at + count]
                    self._at += count
            return {
                name: np.array(plain[name], np.float64)
                if isinstance(kind, str)
                else (_whole(np.array(plain[name], np.float64)), np.array(lengths[name], np.int64))
                for name, kind in element.properties
            }
        except IndexError:
            raise _promised(element, "the file ends before") from None


class _Binary:
    def __init__(self, data: bytes, order: str) -> None:
        self._data, self._order, self._at = data, order, 0

    def take(self, element: _Element) -> dict[str, np.ndarray | tuple[np.ndarray, np.ndarray]]:
        """name -> [count] numbers, or the items of a list and their counts."""
        left = len(self._data) - self._at
        least = sum(np.dtype(kind if isinstance(kind, str) else kind[0]).itemsize for _, kind in element.properties)
        if element.count * max(least, 1) > left:
            raise _promised(element, f"the file has {left:,} more bytes")
        # Nearly every file has lists of one length: then all of them are one array.
        sizes = self._first_lengths(element)
        record = np.dtype(
            [
                field_
                for (name, kind), size in zip(element.properties, sizes, strict=True)
                for field_ in (
                    [(name, self._order + kind)]
                    if isinstance(kind, str)
                    else [(f"{name} length", self._order + kind[0]), (name, self._order + kind[1], (size,))]
                )
            ]
        )
        if element.count * record.itemsize <= left:
            rows = np.frombuffer(self._data, record, element.count, self._at)
            names = [
                (name, size)
                for (name, kind), size in zip(element.properties, sizes, strict=True)
                if not isinstance(kind, str)
            ]
            if all((rows[f"{name} length"] == size).all() for name, size in names):
                self._at += element.count * record.itemsize
                return {
                    name: rows[name].astype(np.float64)
                    if isinstance(kind, str)
                    else (_whole(rows[name].reshape(-1)), np.full(element.count, size, np.int64))
                    for (name, kind), size in zip(element.properties, sizes, strict=True)
                }
        return self._one_by_one(element)

    def _first_lengths(self, element: _Element) -> list[int]:
        at, sizes = self._at, []
        for _, kind in element.properties:
            if isinstance(kind, str):
                sizes.append(0)
                at += np.dtype(kind).itemsize
                continue
            width = np.dtype(kind[0]).itemsize
            length = 0
            if element.count and len(self._data) >= at + width:
                length = _length(np.frombuffer(self._data[at : at + width], self._order + kind[0])[0], element)
            if not 0 <= length <= len(self._data):
                raise ValueError(
                    f"a list of {length:,} items in {element.name}; the file has {len(self._data):,} bytes"
                )
            sizes.append(length)
            at += width + length * np.dtype(kind[1]).itemsize
        return sizes

    def _one_by_one(self, element: _Element) -> dict[str, np.ndarray | tuple[np.ndarray, np.ndarray]]:
        plain: dict[str, list[np.ndarray]] = {name: [] for name, _ in element.properties}
        lengths: dict[str, list[int]] = {name: [] for name, _ in element.properties}
        for _ in range(element.count):
            for name, kind in element.properties:
                count, item = 1, kind if isinstance(kind, str) else kind[1]
                if not isinstance(kind, str):
                    count = _length(self._numbers(element, kind[0], 1)[0], element)
                    lengths[name].append(count)
                plain[name].append(self._numbers(element, item, count))
        joined = {name: np.concatenate(values) if values else np.zeros(0) for name, values in plain.items()}
        return {
            name: joined[name].astype(np.float64)
            if isinstance(kind, str)
            else (_whole(joined[name]), np.array(lengths[name], np.int64))
            for name, kind in element.properties
        }

    def _numbers(self, element: _Element, kind: str, count: int) -> np.ndarray:
        width = np.dtype(kind).itemsize * count
        if count < 0 or self._at + width > len(self._data):
            raise _promised(element, "the file ends before")
        self._at += width
        return np.frombuffer(self._data, self._order + kind, count, self._at - width)


def _whole(numbers: np.ndarray) -> np.ndarray:
    whole = numbers.astype(np.int64)
    if (whole != numbers).any():
        raise ValueError("a face names a vertex that is no whole number")
    return whole


def write(vertices: np.ndarray, faces: np.ndarray) -> bytes:
    """[V, 3] float32 and [F, 3] -> the binary file."""
    head = (
        f"ply\nformat binary_little_endian 1.0\ncomment genkit\nelement vertex {len(vertices)}\nproperty float x\nproperty float y\nproperty float z\n"
        f"element face {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    records = np.zeros(len(faces), np.dtype([("count", "u1"), ("corners", "<i4", 3)]))
    records["count"], records["corners"] = 3, faces
    return head.encode() + vertices.astype("<f4").tobytes() + records.tobytes()
