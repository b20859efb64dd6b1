"""Nearest triangles and crossings of rays: every path against every point with every triangle."""

import math

import pytest
import torch

from genkit.errors import UsageError
from genkit.kernels.closest_triangle.op import closest_triangle
from genkit.kernels.ray_crossings.op import ray_crossings
from genkit.meshes.hierarchy import Hierarchy, Winding
from genkit.meshes.mesh import Mesh
from genkit.native import Missing, library


def soup(faces: int) -> Mesh:
    """Triangles of all sizes, a few of them without area."""
    random = torch.Generator().manual_seed(faces)
    middle, size = torch.rand(faces, 1, 3, generator=random) * 2 - 1, torch.rand(faces, 1, 1, generator=random) ** 3
    corners = middle + size * torch.randn(faces, 3, 3, generator=random)
    corners[:: max(7, faces // 9), 2] = corners[:: max(7, faces // 9), 1]
    return Mesh(corners.reshape(-1, 3), torch.arange(3 * faces).view(-1, 3))


def places(count: int) -> torch.Tensor:
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(count)) * 4 - 2


def has(op: str) -> bool:
    try:
        return library(op) is not None
    except Missing:
        return False


PATHS = ["torch", pytest.param("cpu", marks=pytest.mark.skipif(not has("closest_triangle"), reason="no compiler"))]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("faces", [1, 2, 3, 8, 77, 1000])
@pytest.mark.parametrize("within", [math.inf, 0.3])
def test_the_nearest_triangle_is_the_nearest_of_all(path, faces, within):
    tree, points = Hierarchy(soup(faces)), places(301)
    distance, number = closest_triangle(points, tree.boxes, tree.triangles, within, path=path)
    expected, _ = closest_triangle(points, tree.boxes, tree.triangles, within, path="reference")
    torch.testing.assert_close(distance, expected, rtol=1e-5, atol=1e-5)
    # The named one is as far as said.
    near = distance.isfinite()
    for p, t, d in zip(points[near][:40], tree.triangles[number[near]], distance[near], strict=False):
        torch.testing.assert_close(Hierarchy(single(t)).closest(p[None])[0][0], d, rtol=1e-5, atol=1e-5)


def single(triangle: torch.Tensor) -> Mesh:
    return Mesh(triangle, torch.tensor([[0, 1, 2]]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("faces", [1, 5, 8, 300])
def test_crossings_are_those_of_all_triangles(path, faces):
    round_it = Winding(soup(faces))
    points = places(301).double()
    given = points, round_it._boxes, round_it._triangles, round_it._slack
    assert torch.equal(ray_crossings(*given, path=path), ray_crossings(*given, path="reference"))


@pytest.mark.parametrize("path", PATHS)
def test_no_points_are_no_distances(path):
    tree = Hierarchy(soup(5))
    distance, number = closest_triangle(torch.zeros(0, 3), tree.boxes, tree.triangles, path=path)
    assert distance.shape == number.shape == (0,)


def test_what_does_not_fit_is_named():
    tree, winding = Hierarchy(soup(5)), Winding(soup(5))
    with pytest.raises(ValueError, match="points must be float32"):
        closest_triangle(places(2).double(), tree.boxes, tree.triangles)
    with pytest.raises(ValueError, match="a power of two"):
        closest_triangle(places(2), tree.boxes[1:], tree.triangles)
    with pytest.raises(ValueError, match="triangles must be float32"):
        closest_triangle(places(2), tree.boxes, tree.triangles.flatten(1))
    with pytest.raises(ValueError, match="points must be float64"):
        ray_crossings(places(2), winding._boxes, winding._triangles, 0.0)
    with pytest.raises(ValueError, match="boxes must be"):
        ray_crossings(places(2).double(), winding._boxes[:5], winding._triangles, 0.0)
    with pytest.raises(UsageError):
        closest_triangle(places(2), tree.boxes, tree.triangles, path="triton")
