"""Solids, marching cubes and the procedural dataset: exact distances, watertight meshes, the same shapes for ever."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from genkit.data.loader import batches
from genkit.data.shape_classes.classes import CLASSES
from genkit.data.shapes import Shapes
from genkit.errors import UsageError
from genkit.meshes.marching_cubes import extract, marching_cubes
from genkit.meshes.mesh import Mesh, inspect
from genkit.meshes.solid_parts import Box, Cone, Lathe, Prism, turned
from genkit.meshes.solids import Solid
from genkit.rng import Rng

PARTS = {
    "rounded box": Box((0.1, 0.2, 0.1), (0.3, 0.2, 0.1), 0.05, turned(1, 0.3)),
    "sharp box": Box((0.1, 0.2, 0.1), (0.3, 0.2, 0.1), 0.0, turned(2, -0.8)),
    "cone": Cone((0.0, 0.0, 0.0), (0.2, 0.5, 0.1), 0.3, 0.1),
    "sphere": Cone((0.0, 0.1, 0.0), (0.0, 0.1, 0.0), 0.3, 0.3),
    "bowl": Lathe([(0, 0), (0.3, 0), (0.2, 0.5), (0.1, 0.5), (0.15, 0.1), (0, 0.1)], (0.1, 0, 0), turned(0, 0.4)),
    "prism": Prism([(0, 0), (0.5, 0.1), (0.3, 0.4)], 0.2, (0, 0.1, 0), turned(2, 0.3)),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_agrees_with_its_own_surface(name):
    solid = Solid([PARTS[name]])
    points, normals = solid.sample_surface(20_000, Rng([3]))
    assert solid.distance(points).abs().max() < 1e-6
    torch.testing.assert_close(normals.norm(dim=1), torch.ones(len(points)), rtol=0, atol=1e-5)
    # Away from the surface along the normal is outside, the other way inside; near sharp edges that holds for tiny steps alone.
    assert (solid.distance(points + 1e-4 * normals) > 0).float().mean() > 0.99
    assert (solid.distance(points - 1e-4 * normals) < 0).float().mean() > 0.99
    places = 2 * Rng([4]).uniform(1000, 3)[0] - 1
    excess = torch.cdist(places, points).amin(1) - solid.distance(places).abs()
    assert excess.min() > -1e-5
    assert excess.max() < 0.02  # how far apart the points are
    least, greatest = solid.bounds
    torch.testing.assert_close(points.amin(0), least, rtol=0, atol=3e-3)
    torch.testing.assert_close(points.amax(0), greatest, rtol=0, atol=3e-3)
    assert (points >= least - 1e-6).all()
    assert (points <= greatest + 1e-6).all()


@pytest.mark.parametrize("name", PARTS)
def test_points_are_uniform_over_the_area(name):
    # The area of any region is the volume of a thin layer around it, over its thickness.
    solid = Solid([PARTS[name]])
    points, _ = solid.sample_surface(20_000, Rng([3]))
    places = 0.7 * (2 * Rng([5]).uniform(500_000, 3)[0] - 1) + torch.tensor([0.1, 0.2, 0.0])
    near = places[solid.distance(places).abs() < 0.004]
    assert float(solid.areas[0]) == pytest.approx(len(near) / 500_000 * 1.4**3 / 0.008, rel=0.09)
    for direction in torch.nn.functional.normalize(Rng([6]).normal(4, 3)[0], dim=1):
        edges = (points @ direction).quantile(torch.tensor([0.25, 0.5, 0.75]))
        shares = torch.bucketize(near @ direction, edges).bincount(minlength=4) / len(near)
        assert (shares - 0.25).abs().max() < 0.045


def test_depth_of_a_union_is_the_true_one():
    solid = Solid(
        [Box((-0.2, 0, 0), (0.4, 0.3, 0.3)), Box((0.2, 0, 0), (0.4, 0.3, 0.3))]
    )  # together half sides 0.6, 0.3, 0.3
    whole = Solid([Box((0, 0, 0), (0.6, 0.3, 0.3))])
    surface, normals = solid.sample_surface(20_000, Rng([0]))
    assert whole.distance(surface).abs().max() < 1e-6
    assert ((surface + 1e-4 * normals)[whole.distance(surface + 1e-4 * normals) < 0]).numel() < 0.01 * len(surface)
    # Where both boxes share a piece of surface it is not counted twice.
    share = (surface[:, 0].abs() < 0.2).float().mean()
    assert float(share) == pytest.approx(4 * 0.4 * 0.6 / float(whole.areas[0]), abs=0.01)
    places = 2 * Rng([1]).uniform(4000, 3)[0] - 1
    true = whole.distance(places)
    torch.testing.assert_close(solid.signed_distance(places, surface), true, rtol=0, atol=3e-3)
    assert (solid.distance(places) - true).abs().max() > 0.04  # the least distance to a part is not enough


def test_impossible_parts_are_refused():
    for part in (
        Box((0, 0, 0), (0.1, 0.1, 0.1), 0.2),
        Cone((0, 0, 0), (0.1, 0, 0), 0.5, 0.1),
        Lathe([(-0.1, 0), (0.2, 0), (0, 1)]),
        Prism([(0, 0), (1, 0), (0.2, 0.2), (0, 1)], 0.1),
    ):
        with pytest.raises(ValueError, match=r"rounded box|end of a cone|crosses the axis|convex"):
            Solid([part])


def test_every_case_of_marching_cubes_closes():
    values = torch.randn(60, 6, 6, 6, generator=torch.Generator().manual_seed(0))
    for grid in values:
        found = inspect(marching_cubes(torch.nn.functional.pad(grid, (1,) * 6, value=1.0)))
        assert found.is_watertight, found
        assert found.degenerate == 0
        assert found.volume > 0
    assert len(marching_cubes(torch.ones(4, 4, 4)).faces) == 0
    with pytest.raises(ValueError, match="not finite"):
        marching_cubes(torch.full((4, 4, 4), math.nan))
    with pytest.raises(ValueError, match="at least 2"):
        marching_cubes(torch.ones(1, 4, 4))


def test_marching_cubes_is_exact_where_values_are_linear_and_near_only_suffices():
    axis = torch.linspace(-1, 1, 33)
    grid = torch.cartesian_prod(axis, axis, axis)
    plane = (grid @ torch.tensor([0.3, 0.5, 0.81]) - 0.2).reshape(33, 33, 33)
    found = marching_cubes(plane).vertices
    torch.testing.assert_close(
        found @ torch.tensor([0.3, 0.5, 0.81]), torch.full((len(found),), 0.2), rtol=0, atol=1e-4
    )

    def ball(points):
        return points.norm(dim=1) - 0.7

    dense, sparse = marching_cubes(ball(grid).reshape(33, 33, 33)), extract(ball, 32)
    assert dense.volume == pytest.approx(4 / 3 * math.pi * 0.7**3, rel=0.01)
    torch.testing.assert_close(dense.vertices, sparse.vertices, rtol=0, atol=1e-5)
    assert torch.equal(*(mesh.faces[mesh.faces[:, 0].argsort(stable=True)].sort(0).values for mesh in (dense, sparse)))


@pytest.mark.parametrize("label", range(len(CLASSES)), ids=list(CLASSES))
def test_shapes_of_every_class_are_whole(label):
    data = Shapes(num_shapes=200, num_points=1024, num_distances=256)
    for index in range(label, 48, len(CLASSES)):
        found = inspect(data.mesh(index, 48))
        assert found.is_watertight, (index, str(found))
        assert found.num_components == 1, (index, str(found), data.design(index).caption)
        assert 0.004 < found.volume / 1.6**3 < 0.6
        sample = data[index]
        assert sample["label"] == label
        torch.testing.assert_close(
            (sample["points"].amax(0) - sample["points"].amin(0)).amax(), torch.tensor(1.6), rtol=0, atol=0.05
        )
        assert data.solid(index).distance(sample["points"]).abs().max() < 1e-5
        assert sample["caption"]


def test_a_sample_is_a_function_of_seed_and_index():
    data = Shapes(num_shapes=48, num_points=512, num_distances=256)
    one, again = data[7], Shapes(num_shapes=99, num_points=512, num_distances=256)[7]
    for name in ("points", "normals", "sdf_points", "sdf"):
        assert torch.equal(one[name], again[name])
    assert one["key"] == "train/00007 bottle"
    others = [Shapes(num_shapes=48, seed=1), Shapes(num_shapes=480, split="val"), Shapes(num_shapes=480, split="test")]
    bounds = [data.solid(7).bounds, *(other.solid(7).bounds for other in others)]
    assert all(not torch.equal(a, b) for i, a in enumerate(bounds) for b in bounds[:i])
    assert len({data.info.fingerprint, *(other.info.fingerprint for other in others)}) == 4
    assert data.info.fingerprint == Shapes(num_shapes=48, num_points=512, num_distances=256).info.fingerprint


def test_distances_of_a_sample_are_signed_and_true():
    data = Shapes(num_shapes=12, num_points=4096, num_distances=2048)
    for index in (0, 3, 6):
        sample, solid = data[index], data.solid(index)
        least = solid.distance(sample["sdf_points"])
        assert torch.equal(sample["sdf"] < 0, least < 0)
        assert 0.05 < (least < 0).float().mean() < 0.6
        torch.testing.assert_close(sample["sdf"][least > 0], least[least > 0])
        to_points = torch.cdist(sample["sdf_points"], sample["points"]).amin(1)
        assert (to_points - sample["sdf"].abs()).min() > -1e-4  # nothing on the surface is nearer
        assert (to_points - sample["sdf"].abs()).quantile(0.95) < 0.05
        assert (sample["sdf"][:1024].abs() < 0.06).float().mean() > 0.95
        assert sample["sdf_points"].abs().max() <= 1


def test_batches_hold_the_samples_and_training_draws_new_points():
    data = Shapes(num_shapes=24, num_points=256, num_distances=128, classes=["mug", "car"])
    batch = data.__getitems__(np.array([3, 8]))
    assert batch["points"].shape == (2, 256, 3)
    assert batch["sdf"].shape == (2, 128)
    assert batch["label"].tolist() == [1, 0]
    assert torch.equal(batch["points"][1], data[8]["points"])
    first, second = (next(batches(data, batch_size=4, seed=0, start=start)) for start in (0, 24))
    assert first["sdf_points"].shape == (4, 128, 3)
    seen = {int(i): p for i, p in zip(first["index"], first["points"], strict=True)}
    assert not any(torch.equal(data[i]["points"], p) for i, p in seen.items())
    assert torch.equal(first["points"], next(batches(data, batch_size=4, seed=0))["points"])
    assert not torch.equal(first["points"], second["points"])


def test_wrong_settings_are_named():
    with pytest.raises(UsageError, match=r"no class chiar.*did you mean 'chair'"):
        Shapes(classes=["chiar"])
    with pytest.raises(UsageError, match="none twice"):
        Shapes(classes=["chair", "chair"])
    with pytest.raises(UsageError, match="num_points=0"):
        Shapes(num_points=0)


def test_inspect_tells_what_is_wrong():
    corner = Mesh(torch.eye(4)[:, :3].contiguous(), torch.tensor([[0, 1, 2], [3, 1, 0], [3, 2, 1], [3, 0, 2]]))
    found = inspect(corner)
    assert found.is_watertight
    assert found.volume == pytest.approx(1 / 6)
    assert str(found) == "watertight, 1 component, 4 faces"
    inwards = inspect(Mesh(corner.vertices, corner.faces.flip(1)))
    assert inwards.is_watertight
    assert "look inwards" in str(inwards)
    open_ = inspect(Mesh(corner.vertices, corner.faces[:3]))
    assert (open_.boundary, open_.is_watertight) == (3, False)
    turned_ = corner.faces.clone()
    turned_[0] = turned_[0].flip(0)
    assert inspect(Mesh(corner.vertices, turned_)).flipped == 3
    double = inspect(Mesh(corner.vertices, torch.cat([corner.faces, corner.faces[:1]])))
    assert double.non_manifold == 3
    flat = inspect(Mesh(corner.vertices, torch.tensor([[0, 1, 1]])))
    assert flat.degenerate == 1
    two = Mesh(torch.cat([corner.vertices, corner.vertices + 3]), torch.cat([corner.faces, corner.faces + 4]))
    assert inspect(two).num_components == 2
    with pytest.raises(ValueError, match="names vertex 9 of 4"):
        Mesh(corner.vertices, torch.tensor([[0, 1, 9]]))


def test_kept_points_are_chosen_anew_and_change_no_sample_without_an_epoch():
    options = {"num_shapes": 12, "num_points": 50, "num_distances": 40}
    kept, fresh = Shapes(num_kept=200, **options), Shapes(**options)
    assert kept.info.fingerprint == fresh.info.fingerprint
    assert torch.equal(kept[3]["points"], fresh[3]["points"])
    first, again, other = (kept.fetch([3, 5], Rng.at(0, start, 2)) for start in (0, 0, 2))
    for name, value in first.items():
        assert torch.equal(value, again[name]) if isinstance(value, torch.Tensor) else value == again[name]
    assert not torch.equal(first["points"], other["points"])
    whole = kept._stored[3]
    assert len(whole["points"]) == 200
    for place, value in (("points", "normals"), ("sdf_points", "sdf")):
        same = (first[place][0][:, None] == whole[place]).all(2)  # which of the kept ones each is
        assert same.any(1).all()
        assert torch.equal(first[value][0], whole[value][same.int().argmax(1)]), (
            "places and what belongs to them stay together"
        )
    with pytest.raises(UsageError, match="num_kept=30 must be 0, or at least"):
        Shapes(num_kept=30, **options)
