"""Pictures of meshes: what is nearest is seen, a sphere looks the same from everywhere, files can be opened."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from genkit.data.shapes import Shapes
from genkit.meshes.marching_cubes import extract
from genkit.meshes.mesh import Mesh, normalised
from genkit.meshes.pictures import contact_sheet, picture, write_turntable
from genkit.meshes.render import Camera, orbit, rasterise
from genkit.meshes.shading import VIEWS, portrait, shaded, view


def sphere(resolution: int = 48) -> Mesh:
    return normalised(extract(lambda p: p.norm(dim=1) - 0.8, resolution), to="sphere", size=1.0)


def test_the_nearest_triangle_is_seen_where_rays_meet_it():
    mesh = Shapes(num_shapes=12, num_points=16).mesh(0, 24)
    seen = rasterise(mesh, orbit(30, 20, 2.5), 40)
    # Every ray against every triangle (Moeller and Trumbore 1997), as slow as it is plain.
    eye = orbit(30, 20, 2.5).eye.double()
    rays = seen.rays.reshape(-1, 1, 3).double()
    a, b, c = mesh.corners.double().unbind(1)
    one, two, to_eye = b - a, c - a, eye - a
    p = torch.linalg.cross(rays, two[None])
    determinant = (one * p).sum(-1)
    u = (to_eye * p).sum(-1) / determinant
    q = torch.linalg.cross(to_eye, one)
    v = (rays * q).sum(-1) / determinant
    t = (two * q).sum(-1) / determinant
    t = torch.where((u >= 0) & (v >= 0) & (u + v <= 1), t, math.inf)
    nearest = t.amin(1)
    hit = nearest.isfinite().reshape(40, 40)
    assert (hit == seen.hit).float().mean() > 0.998  # edges of silhouettes may round either way
    where = seen.blend(mesh.vertices, mesh.faces)
    distance = (where - eye.float()).norm(dim=-1)
    both = hit & seen.hit
    assert 100 < int(both.sum()) < 1400
    torch.testing.assert_close(distance[both].double(), nearest.reshape(40, 40)[both], rtol=0, atol=1e-4)
    along = torch.nn.functional.normalize(where - eye.float(), dim=-1)
    assert (along[both] * seen.rays[both]).sum(-1).min() > 1 - 1e-6


def test_a_sphere_looks_the_same_from_everywhere():
    mesh, size = sphere(), 96
    radius = size / 2 * math.tan(math.asin(1 / 2.141)) / math.tan(math.radians(30))
    means = []
    for number in range(len(VIEWS)):
        assert float(view(number).eye.norm()) == pytest.approx(2.141, abs=1e-3)
        grey = shaded(mesh, view(number), size)
        inside = grey < 1
        assert float(inside.sum()) == pytest.approx(math.pi * radius**2, rel=0.02)
        means.append(float(grey[inside].mean()))
    assert max(means) - min(means) < 3e-3
    assert len({tuple(round(x, 3) for x in place) for place in VIEWS}) == 20


def test_the_middle_of_a_sphere_has_the_grey_of_the_formula():
    grey = shaded(sphere(), view(0), 97)[48, 48]
    # All three lights lie in the direction of the eye, 1.141 away: n.l = n.v = v.h = n.h = 1.
    f0, a = 0.04 * 0.8 + 0.3 * 0.2, 0.8**2
    each = (1 - f0) * 0.3 * 0.96 * 0.8 / math.pi + f0 / (math.pi * a**2) / 4.001
    colour = (3 + 9 / 1.141**2) * each
    assert float(grey) == pytest.approx(min(1, colour) ** (1 / 2.2), abs=0.01)


def test_faces_that_look_away_are_dark_and_nothing_is_white():
    mesh = sphere(24)
    inside_out = Mesh(mesh.vertices, mesh.faces.flip(1))
    bright, dark = shaded(mesh, view(3), 48), shaded(inside_out, view(3), 48)
    assert dark[24, 24] < 0.2 < bright[24, 24]
    assert bright[0, 0] == 1
    assert shaded(mesh, Camera(torch.tensor([0.0, 0.1, -0.2])), 16).isfinite().all()  # a camera within
    assert (picture(Mesh(mesh.vertices, mesh.faces[:0]), 16) == 1).all()
    with pytest.raises(ValueError, match="along the y axis"):
        rasterise(mesh, Camera(torch.tensor([0.0, 2.0, 0.0])), 8)


def test_pictures_do_not_depend_on_the_order_of_faces_and_sides_are_right():
    mesh = Shapes(num_shapes=12, num_points=16).mesh(9, 24)
    mixed = Mesh(mesh.vertices, mesh.faces[torch.randperm(len(mesh.faces), generator=torch.Generator().manual_seed(0))])
    camera = orbit(35, 25, 3.6, 36.0)
    assert (portrait(mesh, camera, 32) - portrait(mixed, camera, 32)).abs().mean() < 1e-3
    # A ball at +x stands at the right of a picture from the front, one at +y above.
    for axis, at in ((0, (16, 24)), (1, (8, 16))):
        shift = torch.zeros(3)
        shift[axis] = 0.5
        small = sphere(16)
        hit = (
            rasterise(Mesh(small.vertices * 0.1 + shift, small.faces), orbit(0, 0, 2.0), 32)
            .hit.nonzero()
            .float()
            .mean(0)
        )
        assert (hit - torch.tensor(at)).abs().max() < 2.0


def test_sheets_and_turntables_can_be_opened(tmp_path):
    data = Shapes(num_shapes=12, num_points=16)
    meshes = [data.mesh(i, 16) for i in range(5)]
    sheet = contact_sheet(meshes, columns=3, size=40)
    assert sheet.size[0] == pytest.approx(3 * 42, abs=4)
    assert sheet.size[1] == pytest.approx(2 * 42, abs=4)
    write_turntable(tmp_path / "a.gif", meshes[0], frames=6, size=32)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 6
        assert gif.info["duration"] == 500
