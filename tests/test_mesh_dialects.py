"""Mesh files as other programs write them, and what no program writes: read as they are meant, or refused in words."""

from __future__ import annotations

import json
import struct
import warnings

import numpy as np
import pytest

from genkit.errors import GenkitError
from genkit.meshes import storage

TRIANGLE = b"v 0 0 0\nv 1 0 0\nv 0 1 0\n"
ASCII_STL = (
    b"solid a\nfacet normal 0 0 1\nouter loop\nvertex 0 0 0\nvertex 1 0 0\nvertex 0 1 0\nendloop\nendfacet\nendsolid\n"
)
OFF = b"3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n"
MARK = b"\xef\xbb\xbf"

DIALECTS = {
    "counts right behind the word (ModelNet)": (".off", b"OFF" + OFF),
    "lines end as on an old Mac": (".off", b"OFF\n" + OFF.replace(b"\n", b"\r")),
    "a comment behind a face": (".obj", TRIANGLE + b"f 1 2 3 # the only one\n"),
    "a byte order mark": (".obj", MARK + TRIANGLE + b"f 1 2 3\n"),
    "a line goes on behind a backslash, in DOS": (".obj", TRIANGLE.replace(b"\n", b"\r\n") + b"f 1 2 \\\r\n3\r\n"),
    "lines of an old Mac": (".obj", (TRIANGLE + b"f 1 2 3\n").replace(b"\n", b"\r")),
    "upper case": (".stl", ASCII_STL.upper()),
    "text behind a mark": (".stl", MARK + ASCII_STL),
}


@pytest.mark.parametrize("name", DIALECTS)
def test_dialects_are_read(name: str) -> None:
    suffix, data = DIALECTS[name]
    mesh = storage.parse(data, suffix, f"a{suffix}")
    assert len(mesh.faces) == 1
    assert float(mesh.areas.sum()) == pytest.approx(0.5)


def ply(elements: str, body: bytes, form: str = "binary_little_endian") -> bytes:
    vertices = "element vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
    places = struct.pack("<9f", 0, 0, 0, 1, 0, 0, 0, 1, 0) if form != "ascii" else b"0 0 0 1 0 0 0 1 0\n"
    return f"ply\nformat {form} 1.0\n{vertices}{elements}end_header\n".encode() + places + body


def glb(tree: dict, text: bytes = b"") -> bytes:
    text = text or json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    body = len(text).to_bytes(4, "little") + b"JSON" + text
    return b"glTF" + (2).to_bytes(4, "little") + (12 + len(body)).to_bytes(4, "little") + body


FACE = b"\x03" + struct.pack("<3i", 0, 1, 2)
LISTS = "element face 1\nproperty list {} int vertex_indices\n"
PART = {"nodes": [{"mesh": 0}], "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "mode": 9}]}]}
BROKEN = {
    "short.off": (b"OFF\n3 1 0\n0 0\n1 0 0\n0 1 0\n3 0 1 2\n", "a vertex of 2 numbers"),
    "corner.off": (b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2.5\n", "names '2.5', which is no whole number"),
    "large.off": (b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 99999999999999999999\n", "a number that is too large"),
    "large.obj": (TRIANGLE + b"f 1 2 99999999999999999999\n", "a number that is too large"),
    "word.stl": (ASCII_STL.replace(b"vertex 1", b"vertex one"), "a vertex that is no number"),
    "plain.ply": (ply("element face 1\nproperty int vertex_indices\n", bytes(4)), "its faces have no vertex_indices"),
    "pair.ply": (ply("element face 2\nproperty int vertex_indices\n", bytes(8)), "its faces have no vertex_indices"),
    "twice.ply": (
        ply(LISTS.format("uchar") * 1 + "property uchar r\nproperty uchar r\n", FACE),
        "names r of face twice",
    ),
    "endless.ply": (ply(LISTS.format("float"), struct.pack("<f", float("inf")) + bytes(12)), "a list of inf items"),
    "none.ply": (ply(LISTS.format("uchar"), b"nan 0 1 2\n", "ascii"), "a list of nan items in face"),
    "deep.glb": (glb({}, b"[" * 100_000), "recursion"),
    "mode.glb": (glb(PART), "drawn in mode 9"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_in_words(name: str) -> None:
    data, reason = BROKEN[name]
    with pytest.raises(GenkitError, match=reason) as caught:
        storage.parse(data, f".{name.partition('.')[2]}", name)
    assert str(caught.value).startswith(f"{name}: ")


def test_a_reason_has_an_end() -> None:
    with pytest.raises(GenkitError) as caught:
        storage.parse(b"v 0 0 " + b"x" * 100_000 + b"\nf 1 1 1\n", ".obj", "a.obj")
    assert len(str(caught.value)) < 400


def test_frames_that_are_not_finite_warn_nobody_and_are_refused() -> None:
    places = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], "<f4").tobytes()
    tree = {
        "nodes": [{"mesh": 0, "scale": [float("inf"), 1, 1], "rotation": [1e300, 0, 0, 1]}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
        "buffers": [{"byteLength": 36}],
        "bufferViews": [{"buffer": 0, "byteLength": 36}],
        "accessors": [{"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"}],
    }
    data = glb(tree) + len(places).to_bytes(4, "little") + b"BIN\0" + places
    data = data[:8] + len(data).to_bytes(4, "little") + data[12:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(GenkitError, match="not finite"):
            storage.parse(data, ".glb", "a.glb")
