"""Meshes on disk: every format gives back what was written, other programs agree, and a bad file is named with what is wrong in it."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
import torch

from genkit.errors import GenkitError, UsageError
from genkit.meshes import storage
from genkit.meshes.mesh import Mesh, inspect, merged, normalised, problem_of
from genkit.meshes.sampling import sample_surface
from genkit.rng import Rng

CUBE = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nv 0 0 1\nv 1 0 1\nv 1 1 1\nv 0 1 1\n"
SIDES = "f 4 3 2 1\nf 5 6 7 8\nf 1 2 6 5\nf 3 4 8 7\nf 2 3 7 6\nf 1 5 8 4\n"


@pytest.fixture
def cube(tmp_path):
    (tmp_path / "cube.obj").write_text(CUBE + SIDES)
    return storage.load(tmp_path / "cube.obj")


def same_surface(one: Mesh, other: Mesh) -> bool:
    """Equal triangles, whatever their order and numbering."""
    keys = [sorted(tuple(sorted(map(tuple, c.tolist()))) for c in mesh.corners) for mesh in (one, other)]
    return keys[0] == keys[1] and one.volume == pytest.approx(other.volume, rel=1e-5)


@pytest.mark.parametrize("suffix", storage.SUFFIXES)
def test_every_format_gives_back_what_was_written(tmp_path, cube, suffix):
    moved = Mesh((cube.vertices * torch.tensor([1.0, 1 / 3, 1e-3]) + 0.1).contiguous(), cube.faces)
    path = tmp_path / f"mesh{suffix}"
    storage.save(moved, path)
    again = storage.load(path)
    assert same_surface(again, moved)
    assert inspect(again).is_watertight
    storage.save(again, tmp_path / f"again{suffix}")
    assert same_surface(storage.load(tmp_path / f"again{suffix}"), moved)


@pytest.mark.parametrize("suffix", storage.SUFFIXES)
def test_trimesh_reads_what_is_written_and_writes_what_is_read(tmp_path, cube, suffix):
    trimesh = pytest.importorskip("trimesh", reason="trimesh is not installed")
    path = tmp_path / f"mesh{suffix}"
    storage.save(cube, path)
    theirs = trimesh.load(path, force="mesh")
    assert theirs.is_watertight
    assert theirs.volume == pytest.approx(1.0)
    ball = trimesh.creation.icosphere(2)
    ball.apply_transform(trimesh.transformations.rotation_matrix(0.3, [1, 2, 3], [1, 1, 1]))
    ball.export(tmp_path / f"ball{suffix}")
    mine = storage.load(tmp_path / f"ball{suffix}")
    assert mine.volume == pytest.approx(ball.volume, rel=1e-4)
    assert inspect(mine).is_watertight
    assert len(mine.faces) == 320


def test_polygons_and_references_of_obj(tmp_path):
    text = CUBE.replace("v 0 0 0", "v 0 0 0 0.5 0.5 0.5") + "vt 0 0\nvn 0 0 1\nusemtl x\no thing\ns off\nl 1 2\n"
    text += "f 4/1/1 3/1/1 2//1 1/1\nf -4 -3 -2 \\\n-1\n" + "".join(SIDES.splitlines(keepends=True)[2:])
    (tmp_path / "a.obj").write_text(text)
    mesh = storage.load(tmp_path / "a.obj")
    assert inspect(mesh).is_watertight
    assert mesh.volume == pytest.approx(1.0)


def ply(form: str, faces: str | bytes, num_faces: int = 1, index: str = "int", extra: str = "") -> bytes:
    head = f"ply\nformat {form} 1.0\nelement vertex 4\nproperty double x\nproperty double y\nproperty double z\n{extra}"
    head += f"element face {num_faces}\nproperty list uchar {index} vertex_index\nend_header\n"
    places = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], float)
    order = ">" if "big" in form else "<"
    body = (
        places.astype(f"{order}f8").tobytes()
        if "binary" in form
        else "\n".join(" ".join(map(str, row)) for row in places).encode() + b"\n"
    )
    return head.encode() + body + (faces.encode() if isinstance(faces, str) else faces)


def test_ply_of_both_orders_and_mixed_polygons(tmp_path):
    mixed = [(4, 0, 1, 2, 3), (3, 2, 1, 0)]
    for form, order in (("binary_little_endian", "<"), ("binary_big_endian", ">")):
        faces = b"".join(bytes([row[0]]) + np.array(row[1:], f"{order}u2").tobytes() for row in mixed)
        (tmp_path / "a.ply").write_bytes(ply(form, faces, 2, "ushort"))
        assert storage.load(tmp_path / "a.ply").areas.sum() == pytest.approx(1.5)
    (tmp_path / "a.ply").write_bytes(ply("ascii", "4 0 1 2 3\n3 2 1 0\n", 2))
    assert storage.load(tmp_path / "a.ply").areas.sum() == pytest.approx(1.5)


def gltf(tree: dict, binary: bytes) -> bytes:
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    body = len(text).to_bytes(4, "little") + b"JSON" + text + len(binary).to_bytes(4, "little") + b"BIN\0" + binary
    return b"glTF" + (2).to_bytes(4, "little") + (12 + len(body)).to_bytes(4, "little") + body


def corner_tree(**node) -> tuple[dict, bytes]:
    places = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], "<f4")
    faces = np.array([[2, 1, 0], [0, 1, 3], [1, 2, 3], [2, 0, 3]], "u1")
    tree = {
        "asset": {"version": "2.0"},
        "scenes": [{"nodes": [0]}],
        "nodes": [{"children": [1], "scale": [2, 2, 2]}, {"mesh": 0, **node}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1}]}],
        "buffers": [{"byteLength": 60}],
        "bufferViews": [{"buffer": 0, "byteLength": 48}, {"buffer": 0, "byteOffset": 48, "byteLength": 12}],
        "accessors": [
            {"bufferView": 0, "componentType": 5126, "count": 4, "type": "VEC3"},
            {"bufferView": 1, "componentType": 5121, "count": 12, "type": "SCALAR"},
        ],
    }
    return tree, places.tobytes() + faces.tobytes()


def test_glb_places_its_parts(tmp_path):
    (tmp_path / "a.glb").write_bytes(gltf(*corner_tree(translation=[1, 0, 0], rotation=[0, 0, 0.5**0.5, 0.5**0.5])))
    mesh = storage.load(tmp_path / "a.glb")
    assert mesh.volume == pytest.approx(8 / 6)
    torch.testing.assert_close(mesh.bounds, torch.tensor([[0.0, 0.0, 0.0], [2.0, 2.0, 2.0]]), rtol=0, atol=1e-5)
    (tmp_path / "a.glb").write_bytes(gltf(*corner_tree(scale=[-1, 1, 1])))
    assert storage.load(tmp_path / "a.glb").volume == pytest.approx(8 / 6)  # mirrored, and still looking outwards
    matrix = [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 5, 0, 0, 1]
    (tmp_path / "a.glb").write_bytes(gltf(*corner_tree(matrix=matrix)))
    assert storage.load(tmp_path / "a.glb").bounds[0, 0] == 10


def stl(count: int, triangles: int) -> bytes:
    return b"solid of lies".ljust(80) + count.to_bytes(4, "little") + bytes(50 * triangles)


BAD = {
    "empty.obj": (b"", "empty file"),
    "points.obj": (b"v 0 0 0\nv 1 0 0\n", r"no faces \(2 vertices\)"),
    "word.obj": (b"v 0 0 zero\nf 1 1 1\n", "no number"),
    "far.obj": (b"v 0 0 0\nv 1 0 0\nf 1 2 9\n", "a face names vertex 8, counted from 0, of 2"),
    "zero.obj": (b"v 0 0 0\nf 0 1 1\n", "line 2: a face names vertex 0"),
    "two.obj": (b"v 0 0 0\nf 1 1\n", "no faces"),
    "nan.obj": (b"v nan 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "not finite"),
    "huge.obj": (b"v 1e39 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "huge"),
    "large.obj": (b"v 1e30 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "huge"),
    "away.obj": (b"v 1e9 0 0\nv 1000000064 0 0\nv 1e9 1 0\nf 1 2 3\n", "float32 cannot tell"),
    "line.obj": (b"v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n", "degenerate"),
    "dot.obj": (b"v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n", "one point"),
    "lie.ply": (ply("ascii", "3 0 1 2\n", 1000), "promises 1,000 of face, but the file has 4 more numbers"),
    "lie2.ply": (ply("binary_little_endian", b"\x03" + bytes(12), 10**12), "promises 1,000,000,000,000 of face"),
    "list.ply": (ply("binary_little_endian", b"\xff" + bytes(12)), "a list of 255 items in face; the file has 109 bytes"),
    "text.ply": (ply("ascii", "3 0 1\n"), "file ends before"),
    "half.ply": (ply("ascii", "3 0 1 1.5\n"), "no whole number"),
    "headless.ply": (b"ply\nformat ascii 1.0\n", "no PLY head"),
    "strange.ply": (ply("ascii", "", 0, extra="property quaternion q\n"), "makes no sense: 'property quaternion q'"),
    "middle.ply": (ply("middle_endian", ""), "format is middle_endian"),
    "flat.ply": (ply("ascii", "").replace(b"double z", b"double depth"), "have no z"),
    "lie.stl": (stl(7, 2), "promises 7 triangles, 434 bytes; the file has 184"),
    "short.stl": (b"solid x\nfacet normal 0 0 1\nouter loop\nvertex 0 0 0\nvertex 1 0 0\n", "not three for each facet"),
    "tiny.stl": (b"abc", "3 bytes are no STL"),
    "lie.off": (b"OFF\n8 6 0\n0 0 0\n", "promises 8 vertices and 6 faces, the file has 3 lines"),
    "word.off": (b"NOFFS\n", "does not begin with OFF"),
    "short.off": (b"OFF\n1 1 0\n0 0 0\n3 0 0\n", "a face of 3 corners in a line of 2 numbers"),
    "not.glb": (b"PK\3\4", "does not begin with glTF"),
    "one.glb": (b"glTF" + (1).to_bytes(4, "little") + bytes(4), "glTF version 1"),
    "cut.glb": (gltf(*corner_tree())[:-8], "promises"),
    "lie.glb": (gltf(corner_tree()[0], bytes(20)), "promises 4 values up to byte 48 of 20"),
    "round.glb": (gltf(corner_tree(children=[0])[0], bytes(60)), "in circles"),
    "draco.glb": (gltf({"extensionsRequired": ["KHR_draco_mesh_compression"]}, b""), "KHR_draco_mesh_compression"),
    "odd.glb": (gltf({"nodes": [{"mesh": 3}]}, b""), "description is broken"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path, name):
    data, reason = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(GenkitError, match=reason) as caught:
        storage.load(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize("suffix", storage.SUFFIXES)
def test_no_cut_of_a_file_gets_through_unnoticed_as_a_traceback(tmp_path, cube, suffix):
    storage.save(cube, tmp_path / f"whole{suffix}")
    data = (tmp_path / f"whole{suffix}").read_bytes()
    generator = np.random.default_rng(0)
    path = tmp_path / f"broken{suffix}"
    for end in range(0, len(data), 17):
        path.write_bytes(data[:end])
        read_or_refuse(path)
        noisy = bytearray(data)
        for at in generator.integers(0, len(data), 4):
            noisy[at] = generator.integers(0, 256)
        path.write_bytes(bytes(noisy))
        read_or_refuse(path)


def read_or_refuse(path):
    with contextlib.suppress(GenkitError):
        storage.load(path)


def test_names_of_files(tmp_path, cube):
    with pytest.raises(UsageError, match=r"\.fbx is not a format of meshes; known: \.glb, \.obj"):
        storage.load(tmp_path / "a.fbx")
    with pytest.raises(UsageError, match="no such file"):
        storage.load(tmp_path / "a.obj")
    with pytest.raises(UsageError, match="not a format"):
        storage.save(cube, tmp_path / "a")
    with pytest.raises(ValueError, match="without faces"):
        storage.save(Mesh(cube.vertices, cube.faces[:0]), tmp_path / "a.ply")
    assert not (tmp_path / "a.ply").exists()
    for name in ("x", ".hidden", "none"):
        (tmp_path / name).mkdir()
    for name in ("x/B.STL", "x/a.ply", "c.obj", ".hidden/d.obj", "x/note.txt"):
        (tmp_path / name).write_bytes(b"")
    assert storage.scan(tmp_path) == ["c.obj", "cube.obj", "x/B.STL", "x/a.ply"]
    with pytest.raises(UsageError, match="has no meshes"):
        storage.scan(tmp_path / "none")


def test_normalisation_and_merging(cube):
    boxed = normalised(Mesh(cube.vertices * torch.tensor([1.0, 2.0, 4.0]), cube.faces))
    torch.testing.assert_close(boxed.bounds[1], torch.tensor([0.2, 0.4, 0.8]))
    torch.testing.assert_close(normalised(cube, to="sphere", size=1.0).vertices.norm(dim=1), torch.ones(8))
    soup = Mesh(cube.corners.reshape(-1, 3), torch.arange(36).reshape(12, 3))
    assert not inspect(soup).is_watertight
    assert inspect(merged(soup)).is_watertight
    assert len(merged(soup).vertices) == 8
    assert problem_of(cube) == ""


def test_points_on_a_mesh_are_uniform_and_belong_to_their_faces(cube):
    tall = Mesh(cube.vertices * torch.tensor([1.0, 3.0, 1.0]), cube.faces)
    points, normals, face = sample_surface(tall, 14_000, Rng([1]))
    torch.testing.assert_close(tall.normals[face], normals)
    plane = (points - tall.corners[face, 0]) * normals
    assert plane.sum(1).abs().max() < 1e-5
    share = (normals[:, 1].abs() > 0.5).float().mean()
    assert float(share) == pytest.approx(2 / 14, abs=0.002)
    ends = points[normals[:, 1].abs() > 0.5]
    torch.testing.assert_close(ends.mean(0)[[0, 2]], torch.tensor([0.5, 0.5]), rtol=0, atol=0.03)
    torch.testing.assert_close(ends.var(0)[[0, 2]], torch.full((2,), 1 / 12), rtol=0, atol=0.01)
    # The first half is as evenly spread as the whole.
    assert float((points[:7000, 1]).mean()) == pytest.approx(1.5, abs=0.06)
    again, _, _ = sample_surface(tall, 14_000, Rng([1]))
    assert torch.equal(points, again)
    with pytest.raises(ValueError, match="without area"):
        sample_surface(Mesh(tall.vertices, tall.faces[:0]), 10, Rng([1]))
