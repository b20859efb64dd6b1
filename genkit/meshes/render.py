"""Which triangle a pixel sees, without a screen or a GPU: perspective cameras and a z-buffer over all triangles at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from genkit.meshes.mesh import Mesh

_NEAR = 1e-2  # how far in front of a camera a triangle must lie
_PAIRS = 1 << 22  # of a triangle and a pixel looked at together


@dataclass(frozen=True)
class Camera:
    """A pinhole that looks at the origin, y up.

    Args:
        eye: [3], where it stands; neither at the origin nor above or below it.
        degrees: vertical and horizontal angle of view.
    """

    eye: Tensor
    degrees: float = 60.0

    @property
    def axes(self) -> Tensor:
        """[3, 3]: rows right, up and backwards."""
        back = normalize(self.eye, dim=0)
        right = torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0]), back)
        if float(right.norm()) < 1e-6:
            raise ValueError(f"a camera at {self.eye.tolist()} looks along the y axis, which has no upright picture")
        right = normalize(right, dim=0)
        return torch.stack([right, torch.linalg.cross(back, right), back])


def orbit(azimuth: float, elevation: float, distance: float, degrees: float = 60.0) -> Camera:
    """A camera at angles in degrees: azimuth 0 looks at the front (from +z), 90 at the side that lies at +x."""
    a, e = math.radians(azimuth), math.radians(elevation)
    eye = torch.tensor([math.sin(a) * math.cos(e), math.sin(e), math.cos(a) * math.cos(e)])
    return Camera(eye * distance, degrees)


@dataclass(frozen=True)
class Seen:
    """What a camera sees.

    Attributes:
        face: [Y, X] int64, -1 = nothing.
        weights: [Y, X, 3], shares of the three corners in the place that is seen (corrected for perspective); 0 where there is nothing.
        rays: [Y, X, 3], directions of length 1 from the camera.
    """

    face: Tensor
    weights: Tensor
    rays: Tensor

    @property
    def hit(self) -> Tensor:
        """[Y, X] bool."""
        return self.face >= 0

    def blend(self, values: Tensor, faces: Tensor) -> Tensor:
        """Values of vertices [V, C], mixed over the faces [F, 3] that are seen: [Y, X, C], 0 where there is nothing."""
        return (values[faces[self.face.clamp_min(0)]] * self.weights[..., None]).sum(2)


def rasterise(mesh: Mesh, camera: Camera, size: int) -> Seen:
    """The nearest triangle behind every pixel of a square picture.

    Triangles that reach closer to the camera than 0.01, or behind it, are left out. Both sides of a triangle are seen.

    Args:
        size: pixels per side.
    """
    axes = camera.axes
    focal = 1 / math.tan(math.radians(camera.degrees) / 2)
    place = (torch.arange(size) + 0.5) / size * 2 - 1  # of the middles of pixels, in units of half the picture
    grid_y, grid_x = torch.meshgrid(-place, place, indexing="ij")
    rays = normalize(torch.stack([grid_x / focal, grid_y / focal, torch.full_like(grid_x, -1.0)], -1) @ axes, dim=-1)
    corners = ((mesh.vertices - camera.eye) @ axes.T)[mesh.faces]  # [F, 3, 3] as the camera sees them
    depth = -corners[..., 2]  # [F, 3]
    at = corners[..., :2] * focal / depth.clamp_min(1e-9)[..., None]  # [F, 3, 2] in units of half the picture
    pixel = torch.stack([(at[..., 0] + 1) * size / 2, (1 - at[..., 1]) * size / 2], -1)  # right and down
    visible = (depth > _NEAR).all(1) & pixel.isfinite().flatten(1).all(1)
    low = (pixel.amin(1) - 0.5).ceil().clamp(0, size).nan_to_num(0).long()  # [F, 2], first and last middles inside
    high = (pixel.amax(1) - 0.5).floor().clamp(-1, size - 1).nan_to_num(-1).long()
    span = (high - low + 1).clamp_min(0) * visible[:, None]
    count = span.prod(1)
    nearest = torch.full((size * size,), torch.iinfo(torch.int64).max)
    kept = count.nonzero()[:, 0]
    (a, b, c), z = pixel.unbind(1), 1 / depth.clamp_min(1e-9)
    area = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])  # [F]
    for some in _portions(kept, count[kept]):
        face = some.repeat_interleave(count[some])
        local = torch.arange(len(face)) - (count[some].cumsum(0) - count[some]).repeat_interleave(count[some])
        x = low[face, 0] + local % span[face, 0]
        y = low[face, 1] + local // span[face, 0]
        inside, shares = _shares(pixel[face], area[face], x, y)
        face, number = face[inside], (y * size + x)[inside]
        closeness = (shares[inside] * z[face]).sum(1)
        # The bits of positive floats order as the floats do: one number holds depth and, below it, the triangle.
        rank = ((1 / closeness).view(torch.int32).long() << 32) | face
        nearest.scatter_reduce_(0, number, rank, "amin")
    found = nearest != torch.iinfo(torch.int64).max
    face = torch.where(found, nearest & 0xFFFFFFFF, -1)
    weights = torch.zeros(size * size, 3)
    number = found.nonzero()[:, 0]
    own = face[number]
    _, shares = _shares(pixel[own], area[own], number % size, number // size)
    shares = shares * z[own]
    weights[number] = shares / shares.sum(1, keepdim=True)
    return Seen(face.reshape(size, size), weights.reshape(size, size, 3), rays)


def _shares(pixel: Tensor, area: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the middle of a pixel lies in a triangle, and the shares of its corners there, in the picture: [N], [N, 3]."""
    px, py = x + 0.5, y + 0.5
    (ax, ay), (bx, by), (cx, cy) = (corner.unbind(1) for corner in pixel.unbind(1))
    one = ((bx - px) * (cy - py) - (by - py) * (cx - px)) / area
    two = ((cx - px) * (ay - py) - (cy - py) * (ax - px)) / area
    shares = torch.stack([one, two, 1 - one - two], 1)
    return (shares >= -1e-6).all(1) & (area != 0), shares.clamp_min(0)


def _portions(faces: Tensor, count: Tensor) -> list[Tensor]:
    """Faces in groups of a bounded number of pixels."""
    if not len(faces):
        return []
    group = (count.cumsum(0) - 1) // _PAIRS
    return list(faces.split(group.bincount(minlength=int(group[-1]) + 1)[group.unique()].tolist()))
