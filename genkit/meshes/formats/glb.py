"""GLB, the binary form of glTF 2.0: all triangles of its scene in one frame. Materials, skins and animations are passed over."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from genkit.meshes.formats.polygons import Polygons, of_triangles

_JSON, _BIN = 0x4E4F534A, 0x004E4942
_COMPONENTS = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
_WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}
_MAX_DEPTH = 100  # of nodes below nodes


def read(data: bytes) -> Polygons:
    """Raises ValueError for another file, and for parts of it that are not there or not read (compression, files beside it)."""
    tree, binary = _chunks(data)
    unknown = set(tree.get("extensionsRequired", [])) - {
        "KHR_materials_unlit",
        "KHR_texture_transform",
        "KHR_mesh_quantization",
    }
    if unknown:
        raise ValueError(f"it needs {', '.join(sorted(unknown))}, which is not read; save it without compression")
    vertices: list[np.ndarray] = []
    faces: list[np.ndarray] = []
    first = 0
    try:
        for mesh, frame in _placed(tree):
            for part in tree["meshes"][mesh]["primitives"]:
                mode = part.get("mode", 4)
                if mode in (0, 1, 2, 3):  # points and lines
                    continue
                if mode not in (4, 5, 6):
                    raise ValueError(f"a part is drawn in mode {mode!r}; points, lines and triangles are 0 to 6")
                positions = _accessor(tree, binary, part["attributes"]["POSITION"]).astype(np.float64)
                order = (
                    _accessor(tree, binary, part["indices"]).reshape(-1).astype(np.int64)
                    if "indices" in part
                    else np.arange(len(positions))
                )
                triangles = _triangles(order, mode)
                if len(triangles) and triangles.max() >= len(positions):
                    raise ValueError(f"a face names vertex {triangles.max()} of {len(positions)}")
                if np.linalg.det(frame[:3, :3]) < 0:  # a mirrored part would look inwards
                    triangles = triangles[:, ::-1]
                vertices.append(positions @ frame[:3, :3].T + frame[:3, 3])
                faces.append(triangles + first)
                first += len(positions)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"its description is broken ({error!r})") from None
    if not vertices:
        return of_triangles(np.zeros((0, 3)), np.zeros((0, 3), np.int64))
    return of_triangles(np.concatenate(vertices), np.concatenate(faces))


def _chunks(data: bytes) -> tuple[dict[str, Any], bytes]:
    if data[:4] != b"glTF":
        raise ValueError("it does not begin with glTF")
    version, length = int.from_bytes(data[4:8], "little"), int.from_bytes(data[8:12], "little")
    if version != 2:
        raise ValueError(f"glTF version {version}; 2 is read")
    if length > len(data):
        raise ValueError(f"its head promises {length:,} bytes, the file has {len(data):,}")
    at = 12
    found: dict[int, bytes] = {}
    while at + 8 <= length:
        size, kind = (int.from_bytes(data[at + i : at + i + 4], "little") for i in (0, 4))
        if at + 8 + size > length:
            raise ValueError(f"a part of {size:,} bytes reaches past its end")
        found.setdefault(kind, data[at + 8 : at + 8 + size])
        at += 8 + size
    try:
        tree = json.loads(found[_JSON])
        if not isinstance(tree, dict):
            raise ValueError
    except (KeyError, ValueError):
        raise ValueError("it has no description in JSON") from None
    return tree, found.get(_BIN, b"")


def _placed(tree: dict[str, Any]) -> list[tuple[int, np.ndarray]]:
    """Every use of a mesh in the scene, and the frame it stands in [4, 4]."""
    nodes = tree.get("nodes", [])
    scenes = tree.get("scenes", [])
    roots = scenes[tree.get("scene", 0)].get("nodes", []) if scenes else list(range(len(nodes)))
    if not nodes:
        return [(i, np.eye(4)) for i in range(len(tree.get("meshes", [])))]
    found: list[tuple[int, np.ndarray]] = []
    stack = [(root, np.eye(4), 0) for root in roots]
    while stack:
        number, above, depth = stack.pop()
        if depth > _MAX_DEPTH or len(found) > 100_000:
            raise ValueError("its nodes go round in circles")
        node = nodes[number]
        frame = above @ _frame(node)
        if "mesh" in node:
            found.append((node["mesh"], frame))
        stack += [(child, frame, depth + 1) for child in node.get("children", [])]
    return found


def _frame(node: dict[str, Any]) -> np.ndarray:
    if "matrix" in node:
        return np.array(node["matrix"], np.float64).reshape(4, 4).T
    x, y, z, w = node.get("rotation", (0, 0, 0, 1))
    turn = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
    frame = np.eye(4)
    frame[:3, :3] = turn * np.array(node.get("scale", (1, 1, 1)))
    frame[:3, 3] = node.get("translation", (0, 0, 0))
    return frame


def _accessor(tree: dict[str, Any], binary: bytes, number: int) -> np.ndarray:
    accessor = tree["accessors"][number]
    if "sparse" in accessor or "bufferView" not in accessor:
        raise ValueError("it has sparse values, which are not read")
    view = tree["bufferViews"][accessor["bufferView"]]
    if "uri" in tree["buffers"][view["buffer"]] or view["buffer"] != 0:
        raise ValueError("its numbers lie in another file; save it as one GLB")
    kind, width, count = np.dtype(_COMPONENTS[accessor["componentType"]]), _WIDTHS[accessor["type"]], accessor["count"]
    stride = view.get("byteStride") or kind.itemsize * width
    start = view.get("byteOffset", 0) + accessor.get("byteOffset", 0)
    end = start + stride * (count - 1) + kind.itemsize * width if count else start
    if min(count, start, stride) < 0 or end > len(binary):
        raise ValueError(f"it promises {count:,} values up to byte {end:,} of {len(binary):,}")
    rows = np.lib.stride_tricks.as_strided(
        np.frombuffer(binary, np.uint8, offset=start) if count else np.zeros(0, np.uint8),
        (count, kind.itemsize * width),
        (stride, 1),
        writeable=False,
    )
    values = np.ascontiguousarray(rows).view(kind).reshape(count, width)
    if accessor.get("normalized") and kind.kind != "f":
        return np.maximum(values / np.iinfo(kind).max, -1.0)
    return values


def _triangles(order: np.ndarray, mode: int) -> np.ndarray:
    if mode == 4:
        return order[: len(order) // 3 * 3].reshape(-1, 3)
    if len(order) < 3:
        return np.zeros((0, 3), np.int64)
    if mode == 6:  # a fan
        return np.stack([np.full(len(order) - 2, order[0]), order[1:-1], order[2:]], 1)
    strip = np.stack([order[:-2], order[1:-1], order[2:]], 1)
    strip[1::2] = strip[1::2, [1, 0, 2]]
    return strip


def write(vertices: np.ndarray, faces: np.ndarray) -> bytes:
    """[V, 3] float32 and [F, 3] -> the file, one mesh with a plain grey surface."""
    positions, indices = vertices.astype("<f4").tobytes(), faces.astype("<u4").tobytes()
    tree = {
        "asset": {"version": "2.0", "generator": "genkit"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "materials": [
            {
                "pbrMetallicRoughness": {
                    "baseColorFactor": [0.7, 0.72, 0.75, 1],
                    "metallicFactor": 0.1,
                    "roughnessFactor": 0.8,
                }
            }
        ],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1, "material": 0}]}],
        "buffers": [{"byteLength": len(positions) + len(indices)}],
        "bufferViews": [
            {"buffer": 0, "byteOffset": 0, "byteLength": len(positions), "target": 34962},
            {"buffer": 0, "byteOffset": len(positions), "byteLength": len(indices), "target": 34963},
        ],
        "accessors": [
            {
                "bufferView": 0,
                "componentType": 5126,
                "count": len(vertices),
                "type": "VEC3",
                "min": vertices.min(0).tolist(),
                "max": vertices.max(0).tolist(),
            },
            {"bufferView": 1, "componentType": 5125, "count": faces.size, "type": "SCALAR"},
        ],
    }
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    binary = positions + indices
    chunks = [(len(text), _JSON, text), (len(binary), _BIN, binary)]
    body = b"".join(size.to_bytes(4, "little") + kind.to_bytes(4, "little") + part for size, kind, part in chunks)
    return b"glTF" + (2).to_bytes(4, "little") + (12 + len(body)).to_bytes(4, "little") + body
