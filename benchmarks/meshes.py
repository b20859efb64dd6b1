"""Distances, marching cubes, points and pictures of meshes against open3d, scikit-image and trimesh.

`genkit bench meshes` times the pairs; peers that are not installed are named. `python benchmarks/meshes.py` prints how many meshes a minute one core prepares
for training.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit.bench import Case
from genkit.data.meshes import STORED
from genkit.data.shapes import Shapes, around
from genkit.meshes.hierarchy import Hierarchy, Winding, signed_distance
from genkit.meshes.marching_cubes import marching_cubes
from genkit.meshes.mesh import Mesh
from genkit.meshes.render import orbit, rasterise
from genkit.meshes.sampling import sample_surface
from genkit.rng import Rng

GOAL = 1


def cases(quick: bool) -> Iterable[Case]:
    """A chair of 64 cells per axis, 4,000 (quick) or 20,000 places, half of them near the surface; one thread on both sides where the peer has a setting."""
    mesh = Shapes(num_shapes=12, num_points=16, num_distances=0).mesh(0, 64)
    count = 4000 if quick else 20_000
    places = around(sample_surface(mesh, count, Rng([0]))[0], count, Rng([1]))
    size = f"{len(mesh.faces):,} faces"
    scene: Any = _scene(mesh)
    points: Any = scene
    signed: Any = scene
    unsigned: Any = scene
    cast: Any = scene
    if not isinstance(scene, str):
        open3d, ray_scene = scene
        theirs = open3d.geometry.TriangleMesh(
            open3d.utility.Vector3dVector(mesh.vertices.double().numpy()),
            open3d.utility.Vector3iVector(mesh.faces.numpy().astype(np.int32)),
        )
        theirs.compute_triangle_normals()
        asked = open3d.core.Tensor(places.numpy())

        def signed() -> Any:
            return ray_scene.compute_signed_distance(asked, nthreads=torch.get_num_threads())

        def unsigned() -> Any:
            # Ours builds its tree in the call, so theirs does too.
            return _scene(mesh)[1].compute_distance(asked, nthreads=torch.get_num_threads())

        def points() -> Any:
            return theirs.sample_points_uniformly(STORED, use_triangle_normal=True)

        camera = orbit(35, 25, 2.5)
        rays = ray_scene.create_rays_pinhole(60.0, [0.0, 0.0, 0.0], camera.eye.tolist(), [0.0, 1.0, 0.0], 128, 128)

        def cast() -> Any:
            return ray_scene.cast_rays(rays, nthreads=torch.get_num_threads())

    yield Case(
        f"signed distance, {count:,} places, {size}",
        _name("open3d"),
        GOAL,
        lambda: signed_distance(mesh, places),
        signed,
    )
    yield Case(
        f"distance with its tree, {count:,} places, {size}",
        _name("open3d"),
        GOAL,
        lambda: Hierarchy(mesh).closest(places),
        unsigned,
    )
    drawn = f"{STORED:,} points with normals, {size}"
    yield Case(drawn, _name("open3d"), GOAL, lambda: sample_surface(mesh, STORED, Rng([0])), points)
    yield Case(drawn, _name("trimesh"), GOAL, lambda: sample_surface(mesh, STORED, Rng([0])), _trimesh(mesh))
    yield Case(
        f"what 128x128 pixels see, {size}",
        _name("open3d"),
        GOAL,
        lambda: rasterise(mesh, orbit(35, 25, 2.5), 128),
        cast,
    )
    side = 48 if quick else 96
    axis = torch.linspace(-1, 1, side)
    grid = torch.cartesian_prod(axis, axis, axis)
    values = ((grid**2).sum(1).sqrt() - 0.7 + 0.05 * (9 * grid).sin().prod(1)).reshape(side, side, side)
    yield Case(f"marching cubes, {side}^3", _name("skimage"), GOAL, lambda: marching_cubes(values), _skimage(values))


def _name(module: str) -> str:
    try:
        return f"{module} {__import__(module).__version__}"
    except ImportError:
        return module


def _scene(mesh: Mesh) -> Any:
    """(open3d, scene), or one line on why there is none."""
    try:
        import open3d
    except (ImportError, OSError) as error:
        return f"open3d cannot be imported ({' '.join(str(error).split())})"
    scene = open3d.t.geometry.RaycastingScene(nthreads=torch.get_num_threads())
    scene.add_triangles(mesh.vertices.numpy(), mesh.faces.numpy().astype(np.uint32))
    return open3d, scene


def _skimage(values: Tensor) -> Callable[[], Any] | str:
    try:
        from skimage.measure import marching_cubes as theirs
    except ImportError:
        return "scikit-image is not installed"
    return lambda: theirs(values.numpy(), 0.0)


def _trimesh(mesh: Mesh) -> Callable[[], Any] | str:
    try:
        import trimesh
    except ImportError:
        return "trimesh is not installed"
    theirs = trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), process=False)

    def sample() -> Any:
        points, faces = trimesh.sample.sample_surface(theirs, STORED)
        return points, theirs.face_normals[faces]

    return sample


def main() -> None:
    """Where the time goes when a mesh is prepared: 50,000 points, 50,000 signed distances."""
    data = Shapes(num_shapes=12, num_points=16, num_distances=0)
    for index in (0, 3, 6, 8):
        mesh = data.mesh(index, 64)
        times = [time.process_time()]
        points, _, _ = sample_surface(mesh, STORED, Rng([0]))
        places = around(points, STORED, Rng([0]))
        times.append(time.process_time())
        Hierarchy(mesh).closest(places)
        times.append(time.process_time())
        Winding(mesh)(places)
        times.append(time.process_time())
        drawn, near, sign = (later - sooner for sooner, later in itertools.pairwise(times))
        total = drawn + near + sign
        print(
            f"{data.classes[index]:10} {len(mesh.faces):6,} faces: points {drawn:.2f} s, distances {near:.2f} s, signs {sign:.2f} s, {60 / total:.0f} meshes a minute"
        )


if __name__ == "__main__":
    main()
