"""Folders of meshes as data: exact distances, repair only when asked, prepared once, bad files named and passed over."""

from __future__ import annotations

import os
import zipfile

import numpy as np
import pytest
import torch

from genkit.cli import main
from genkit.data import fetch
from genkit.data.loader import batches, read_all
from genkit.data.meshes import Meshes
from genkit.data.shapes import Shapes
from genkit.errors import GenkitError, UsageError
from genkit.kernels.closest_triangle.reference import squared_distance
from genkit.meshes import storage
from genkit.meshes.hierarchy import Hierarchy, Winding, signed_distance
from genkit.meshes.mesh import Mesh, inspect, normalised
from genkit.meshes.repair import reachable, repaired
from genkit.rng import Rng

SHAPES = Shapes(num_shapes=24, num_points=512, num_distances=256)


def places(count: int, seed: int = 0) -> torch.Tensor:
    return 2 * Rng([seed]).uniform(count, 3)[0] - 1


def box(half: float, at: float = 0.0) -> Mesh:
    corners = torch.cartesian_prod(*[torch.tensor([-half, half])] * 3)
    quads = torch.tensor([[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]])
    mesh = Mesh(corners + at, torch.cat([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]]))
    assert inspect(mesh).is_watertight
    assert mesh.volume > 0
    return mesh


def test_closest_points_are_those_of_a_search_through_all():
    for mesh in (SHAPES.mesh(0, 20), SHAPES.mesh(6, 12), box(0.5), Mesh(torch.eye(3), torch.tensor([[0, 1, 2]]))):
        points = torch.cat([places(200), mesh.vertices[:50], mesh.corners.mean(1)[:50]])
        distance, face = Hierarchy(mesh).closest(points)
        every = squared_distance(points[:, None].expand(-1, len(mesh.faces), 3), mesh.corners[None])
        torch.testing.assert_close(distance, every.amin(1).sqrt(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(every[torch.arange(len(points)), face], every.amin(1), rtol=1e-5, atol=1e-9)
        near, _ = Hierarchy(mesh).closest(points, within=0.2)
        torch.testing.assert_close(near, torch.where(distance <= 0.2, distance, torch.inf))


def test_distance_to_a_triangle_by_hand():
    triangle = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    asked = torch.tensor([[0.2, 0.2, 0.5], [-3.0, -4, 0], [0.5, -2, 0], [1, 1, 0], [0.3, 0.3, 0], [2, 0, 1]])
    found = squared_distance(asked, triangle.expand(6, 3, 3))
    torch.testing.assert_close(found, torch.tensor([0.25, 25.0, 4.0, 0.5, 0.0, 2.0]))
    # One that is only a line, and one that is only a point.
    line = torch.stack([triangle[0], triangle[1], triangle[1]])
    assert squared_distance(torch.tensor([[0.5, 2.0, 0.0]]), line[None]) == 4
    assert squared_distance(torch.tensor([[0.0, 2.0, 0.0]]), triangle[:1].expand(1, 3, 3)) == 4


def test_signs_agree_with_the_solid_a_mesh_was_made_of():
    for index in (0, 5, 6, 9):
        mesh, solid = SHAPES.mesh(index, 48), SHAPES.solid(index)
        asked = torch.cat([places(2000), SHAPES[index]["sdf_points"]])
        mine, true = signed_distance(mesh, asked), solid.signed_distance(asked, solid.sample_surface(8000, Rng([0]))[0])
        clear = true.abs() > 0.02
        assert torch.equal(mine[clear] < 0, true[clear] < 0)
        assert (mine - true).abs().quantile(0.99) < 0.03


def test_rays_through_edges_and_corners_count_once_and_overlaps_twice():
    one = box(0.5)
    assert Winding(one)(torch.tensor([[0.0, 0, 0], [0.25, 0.25, 0.25], [0.6, 0, 0], [-0.5001, 0, 0]])).tolist() == [
        1,
        1,
        0,
        0,
    ]
    # Below vertices and edges along the rays' own direction.
    up = Winding._TURN.T.float()[2]
    below = torch.cat([one.vertices, one.corners[:, :2].mean(1)]) - 3 * up
    assert Winding(one)(below).abs().max() == 0
    both = Mesh(torch.cat([one.vertices, box(0.5, 0.3).vertices]), torch.cat([one.faces, one.faces + 8]))
    assert Winding(both)(torch.tensor([[0.1, 0.1, 0.1], [-0.4, 0, 0], [0.7, 0.7, 0.7]])).tolist() == [2, 1, 1]
    assert Winding(Mesh(one.vertices, one.faces.flip(1)))(torch.zeros(1, 3)).tolist() == [-1]
    assert signed_distance(one, torch.tensor([[0.0, 0, 0], [0, 0, 2]])).tolist() == [-0.5, 1.5]


def test_open3d_finds_the_same_distances():
    open3d = pytest.importorskip("open3d", reason="open3d is not installed", exc_type=ImportError)
    mesh = SHAPES.mesh(3, 32)
    scene = open3d.t.geometry.RaycastingScene()
    scene.add_triangles(mesh.vertices.numpy(), mesh.faces.numpy().astype(np.uint32))
    asked = places(3000)
    theirs = torch.from_numpy(scene.compute_signed_distance(asked.numpy(), nsamples=11).numpy())
    torch.testing.assert_close(signed_distance(mesh, asked), theirs, rtol=0, atol=1e-5)


def test_repair_closes_what_is_open_and_keeps_what_was_there():
    mesh = normalised(SHAPES.mesh(3, 32))
    torn = Mesh(mesh.vertices, mesh.faces[Rng([0]).uniform(len(mesh.faces))[0] > 0.02])
    assert not inspect(torn).is_watertight
    fixed = repaired(torn, 48)
    found = inspect(fixed)
    assert found.is_watertight
    assert found.volume > mesh.volume  # it grows by the shell
    reach = torch.cdist(fixed.vertices[::7], mesh.vertices).amin(1)
    assert reach.max() < 2.5 * 2 / 48
    sheet = Mesh(
        torch.tensor([[-0.8, -0.8, 0.0], [0.8, -0.8, 0], [0.8, 0.8, 0], [-0.8, 0.8, 0]]),
        torch.tensor([[0, 1, 2], [0, 2, 3]]),
    )
    plate = repaired(sheet, 32)
    assert inspect(plate).is_watertight
    assert plate.volume == pytest.approx(1.6**2 * 2 / 16, rel=0.15)
    with pytest.raises(ValueError, match="has gaps"):
        repaired(sheet, 32, thickness=0.5)


def test_what_can_be_reached_goes_round_corners():
    free = torch.ones(9, 9, 9, dtype=torch.bool)
    free[2:7, 2:7, 2:7] = False
    free[3:6, 3:6, 3:6] = True  # a hollow
    assert not reachable(free)[4, 4, 4]
    free[4, 4, 6] = True  # and a hole in its wall
    assert torch.equal(reachable(free), free)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr("genkit.data.meshes.STORED", 4000)
    root = tmp_path / "meshes"
    for i in (0, 1, 12, 13):
        mesh = SHAPES.mesh(i, 32)
        storage.save(Mesh(mesh.vertices * 7 + 3, mesh.faces), root / SHAPES.classes[i % 12] / f"my_{i}.ply")
    torn = SHAPES.mesh(2, 32)
    storage.save(Mesh(torn.vertices, torn.faces[5:]), root / "lamp" / "torn.obj")
    (root / "chair" / "broken.ply").write_bytes(
        b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nend_header\n5\n"
    )
    return root


def test_samples_of_a_folder(folder):
    data = Meshes(path=str(folder), num_points=600, num_distances=400)
    assert data.info.class_names == ("chair", "lamp", "table")
    assert data.keys[:2] == ["chair/broken.ply", "chair/my_0.ply"]
    sample = data[1]
    assert (sample["label"], sample["caption"]) == (0, "my 0")
    assert sample["points"].shape == sample["normals"].shape == (600, 3)
    extent = sample["points"].amax(0) - sample["points"].amin(0)
    assert float(extent.max()) == pytest.approx(1.6, abs=0.03)
    mesh = data.mesh(1)
    torch.testing.assert_close(signed_distance(mesh, sample["sdf_points"]), sample["sdf"], rtol=0, atol=2e-3)
    assert Hierarchy(mesh).closest(sample["points"])[0].max() < 1e-3
    share = (sample["sdf"].abs() < 0.06).float().mean()
    assert 0.45 < float(share) < 0.85  # half of them near
    assert torch.equal(data[1]["points"], Meshes(path=str(folder), num_points=600, num_distances=400)[1]["points"])
    for index, reason in ((0, "have no y, z"), (3, r"not watertight.*set data.repair=true")):
        with pytest.raises(GenkitError, match=reason) as caught:
            data[index]
        assert str(folder / data.keys[index]) in str(caught.value)


def test_bad_files_are_passed_over_and_named(folder, caplog):
    data = Meshes(path=str(folder), num_points=64, num_distances=32)
    read = list(read_all(data, 4))
    assert [key for batch in read for key in batch["key"]] == [key for key in data.keys if "my_" in key]
    assert set(data.skipped) == {"chair/broken.ply", "lamp/torn.obj"}
    assert "lamp/torn.obj" in caplog.text
    batch = next(batches(data, batch_size=6, seed=0))
    assert batch["sdf"].shape == (6, 32)
    assert not {"chair/broken.ply", "lamp/torn.obj"} & set(batch["key"])
    again = next(batches(data, batch_size=6, seed=0))
    assert torch.equal(batch["points"], again["points"])
    surfaces = Meshes(path=str(folder), num_points=64, num_distances=0)
    assert "sdf" not in surfaces[3]  # torn, but it has a surface
    healed = Meshes(path=str(folder), num_points=64, num_distances=32, repair=True, resolution=32)
    assert healed[3]["sdf"].min() < 0


def test_only_bad_files(tmp_path, monkeypatch):
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "kept"))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a.stl").write_bytes(b"x")
    data = Meshes(path=str(tmp_path / "m"))
    with pytest.raises(GenkitError, match=r"none of the 1 meshes.*a.stl: 1 bytes are no STL"):
        next(batches(data, batch_size=1, seed=0))
    for wrong, reason in (
        ({"num_points": 10**6}, "must be 1 to 50,000"),
        ({"resolution": 2}, "too coarse"),
        ({"split": "val"}, "needs data.val_fraction"),
        ({"split": "val", "val_fraction": 0.1}, "leaves no mesh"),
    ):
        with pytest.raises(UsageError, match=reason):
            Meshes(path=str(tmp_path / "m"), **wrong)


def test_prepare_from_the_command_line_goes_on_where_it_stopped(folder, capsys):
    prepare = ["data", "prepare", str(folder), "num_points=64", "num_distances=64", "--workers", "1", "-q"]
    assert main(prepare) == 0
    text = capsys.readouterr().out
    assert "6 meshes of" in text
    assert "4 prepared" in text
    assert "left out lamp/torn.obj: not watertight" in text
    kept = sorted((folder.parent / "kept" / "meshes").glob("*.npz"))
    assert len(kept) == 4
    kept[0].unlink()
    assert main(prepare) == 0
    assert "1 prepared" in (text := capsys.readouterr().out)
    assert "3 were there" in text
    assert main([*prepare, "repair=true", "resolution=24"]) == 0
    assert "5 prepared" in capsys.readouterr().out
    assert main(["data", "prepare", str(folder), "repare=true"]) == 2
    assert "did you mean 'repair'" in capsys.readouterr().err
    assert main(["data", "prepare", "toy/vq-fashion"]) == 2
    assert "only meshes are prepared" in capsys.readouterr().err
    assert main(["data", "prepare", str(folder), "--workers", "0"]) == 2
    data = Meshes(path=str(folder), num_points=64, num_distances=64)
    data.place(1).write_bytes(b"nonsense")
    with pytest.raises(GenkitError, match="delete it, it is made again"):
        data[1]
    before = data.place(1)
    os.utime(folder / data.keys[1], (1, 1))  # a changed file is prepared anew
    assert data.place(1) != before


def test_check_of_a_folder_of_meshes(folder, capsys):
    assert main(["data", "check", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "5 good meshes of 6 files, 4 of them watertight" in text
    assert "chair/broken.ply: its vertices have no y, z" in text
    assert "lamp/torn.obj: not watertight" in text


def test_a_catalogue_becomes_a_folder_of_classes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch, "_INSTALLED", tmp_path / "installed")
    (tmp_path / "installed").mkdir()
    catalogue = (
        "license=Creative Commons\nname#1=Red arm\\u0063\\\n  hair\nmodel#1=/a/x.obj\nwidth#1=100\ndepth#1=50\nheight#1=200\ncategory#1=Living room\n"
        "creator#1=A. Body\nmodelRotation#1=1 0 0 0 0 1 0 -1 0\nname#2=Thing\nmodel#2=/b.obj\nwidth#2=1\nheight#2=1\ndepth#2=1\ncategory#2=Living room\n"
    )
    with zipfile.ZipFile(tmp_path / "installed" / "Cat.sh3f", "w") as archive:
        archive.writestr("PluginFurnitureCatalog.properties", catalogue.encode("latin-1"))
        archive.writestr("a/x.obj", "v 0 0 0\nv 1 0 0\nv 0 2 0\nv 0 0 3\nf 1 3 2\nf 1 2 4\nf 2 3 4\nf 3 1 4\n")
        archive.writestr("b.obj", "v 0 0 0\n")
    out = tmp_path / "out"
    assert main(["data", "fetch", "sweethome3d", "-o", str(out), "-q"]) == 0
    assert "left out Cat/Thing: b.obj: no faces" in capsys.readouterr().out
    mesh = storage.load(out / "chair" / "red-armchair.ply")
    torch.testing.assert_close(mesh.bounds[1] - mesh.bounds[0], torch.tensor([1.0, 2.0, 0.5]))
    assert "| chair/red-armchair.ply | Red armchair | A. Body | Cat |" in (out / "ATTRIBUTION.md").read_text()
    assert fetch.class_of("Bookcase", "Office") == "shelf"
    assert fetch.class_of("Armchairs", "Office") == "chair"
    assert fetch.class_of("Statue", "Living room") == "living-room"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").write_text("")
    assert main(["data", "fetch", "sweethome3d", "-o", str(tmp_path / "other")]) == 2
    assert main(["data", "fetch", "shapenet"]) == 2
    assert "known: sweethome3d" in capsys.readouterr().err
    monkeypatch.setattr(fetch, "_INSTALLED", tmp_path / "nowhere")
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    assert main(["data", "fetch", "sweethome3d", "-o", str(tmp_path / "new")]) == 1
    assert "apt-get install sweethome3d-furniture" in capsys.readouterr().err
