"""A triangle mesh, and what can be wrong with one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

HUGE = 1e6  # times the size of a mesh its coordinates may lie from the origin before float32 can no longer tell its vertices apart


@dataclass(frozen=True, eq=False)
class Mesh:
    """Triangles over shared vertices.

    Args:
        vertices: [V, 3] float32, any unit; y is up where there is an up.
        faces: [F, 3] int64, rows of `vertices`, counter-clockwise seen from outside.

    Raises: ValueError for other shapes or types, and for faces that name vertices which are not there.
    """

    vertices: Tensor
    faces: Tensor

    def __post_init__(self) -> None:
        for name, value, dtype in (("vertices", self.vertices, torch.float32), ("faces", self.faces, torch.int64)):
            if value.ndim != 2 or value.shape[1] != 3 or value.dtype != dtype:
                raise ValueError(f"{name} must be [*, 3] {dtype}, got {list(value.shape)} {value.dtype}")
        if len(self.faces) and (self.faces.min() < 0 or self.faces.max() >= len(self.vertices)):
            number = int(self.faces.max() if self.faces.max() >= len(self.vertices) else self.faces.min())
            raise ValueError(f"a face names vertex {number} of {len(self.vertices)}")

    @cached_property
    def corners(self) -> Tensor:
        """[F, 3, 3]: the three vertices of every face."""
        return self.vertices[self.faces]

    @cached_property
    def crosses(self) -> Tensor:
        """[F, 3]: normals as long as twice the area."""
        a, b, c = self.corners.unbind(1)
        return torch.linalg.cross(b - a, c - a)

    @property
    def areas(self) -> Tensor:
        """[F]."""
        return self.crosses.norm(dim=1) / 2

    @cached_property
    def normals(self) -> Tensor:
        """[F, 3] of length 1; 0 for a face without area."""
        return torch.nn.functional.normalize(self.crosses, dim=1)

    @cached_property
    def vertex_normals(self) -> Tensor:
        """[V, 3] of length 1: the mean over the faces around, weighted by area."""
        total = torch.zeros_like(self.vertices)
        for corner in self.faces.unbind(1):
            total.index_add_(0, corner, self.crosses)
        return torch.nn.functional.normalize(total, dim=1)

    @property
    def bounds(self) -> Tensor:
        """[2, 3]: the least and greatest coordinates of the vertices that faces use."""
        used = self.vertices[self.faces.flatten().unique()]
        return torch.stack([used.amin(0), used.amax(0)])

    @property
    def volume(self) -> float:
        """Enclosed by it, of a watertight mesh; negative when its faces look inwards."""
        a, b, c = (self.corners.double() - self.bounds.mean(0).double()).unbind(1)
        return float((torch.linalg.cross(a, b) * c).sum()) / 6


@dataclass(frozen=True)
class Findings:
    """What `inspect` says of a mesh.

    Attributes:
        num_components: pieces that share no vertex.
        degenerate: faces without area, or with a vertex twice.
        boundary: edges of a single face.
        non_manifold: edges of more than two faces.
        flipped: edges along which both faces run the same way: they cannot both look outwards.
        volume: see Mesh.volume; 0 where the mesh is not watertight.
    """

    num_vertices: int
    num_faces: int
    num_components: int
    degenerate: int
    boundary: int
    non_manifold: int
    flipped: int
    volume: float

    @property
    def is_watertight(self) -> bool:
        """Whether every edge joins exactly two faces that agree on which side is outside."""
        return self.num_faces > 0 and not (self.boundary or self.non_manifold or self.flipped)

    def __str__(self) -> str:
        """ "watertight, 1 component, 320 faces", or what is wrong."""
        wrong = [
            f"{count:,} {word}"
            for count, word in (
                (self.boundary, "open edges"),
                (self.non_manifold, "edges of more than two faces"),
                (self.flipped, "edges between faces that look to different sides"),
                (self.degenerate, "faces without area"),
            )
            if count
        ]
        inwards = ["faces look inwards"] if self.is_watertight and self.volume < 0 else []
        parts = "1 component" if self.num_components == 1 else f"{self.num_components} components"
        state = "watertight" if self.is_watertight else "not watertight"
        return ", ".join([state, parts, f"{self.num_faces:,} faces", *inwards, *wrong])


def inspect(mesh: Mesh) -> Findings:
    """Count what a renderer forgives and a signed distance does not."""
    faces = mesh.faces
    twice = (faces[:, 0] == faces[:, 1]) | (faces[:, 1] == faces[:, 2]) | (faces[:, 2] == faces[:, 0])
    degenerate = twice | (mesh.areas == 0)
    edges = faces[~twice][:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)  # [3 F, 2] in the direction of their faces
    low, high = edges.amin(1), edges.amax(1)
    _, which, counts = torch.unique(low * len(mesh.vertices) + high, return_inverse=True, return_counts=True)
    forward = torch.zeros_like(counts).index_add_(0, which, (edges[:, 0] < edges[:, 1]).long())
    findings = Findings(
        num_vertices=len(mesh.vertices),
        num_faces=len(faces),
        num_components=num_components(mesh),
        degenerate=int(degenerate.sum()),
        boundary=int((counts == 1).sum()),
        non_manifold=int((counts > 2).sum()),
        flipped=int(((counts == 2) & (forward != 1)).sum()),
        volume=0.0,
    )
    return Findings(**{**vars(findings), "volume": mesh.volume}) if findings.is_watertight else findings


def component_of(mesh: Mesh) -> Tensor:
    """[V] int64: the least vertex of the piece that a vertex belongs to; one of no face is a piece of its own."""
    labels = torch.arange(len(mesh.vertices))
    pairs = mesh.faces[:, [0, 1, 1, 2]].reshape(-1, 2)
    while len(pairs):
        joined = labels[pairs]  # [E, 2]
        least = joined.amin(1)
        # Hang both roots under the smaller one, then let every vertex point at its root.
        new = labels.scatter_reduce(0, joined.reshape(-1), least.repeat_interleave(2), "amin")
        while not torch.equal(new, new[new]):
            new = new[new]
        if torch.equal(new, labels):
            break
        labels = new
    return labels


def num_components(mesh: Mesh) -> int:
    """Pieces that have faces."""
    return len(component_of(mesh)[mesh.faces[:, 0]].unique()) if len(mesh.faces) else 0


def problem_of(mesh: Mesh) -> str:
    """Why nothing can be made of a mesh, in words; empty when it has a surface."""
    if not len(mesh.faces):
        return f"no faces ({len(mesh.vertices):,} vertices)"
    used = mesh.corners
    if not used.isfinite().all():
        return f"{int((~used.isfinite().flatten(1).all(1)).sum()):,} faces have coordinates that are not finite"
    least, greatest = mesh.bounds.double()
    side, away = float((greatest - least).max()), float(mesh.bounds.abs().max())
    if side == 0:
        return "all its vertices are one point"
    if side > 1e18:
        return f"its coordinates are huge (a side of {side:.3g}); areas overflow"
    if away > HUGE * side:
        return f"it lies {away:.3g} from the origin and is {side:.3g} large; float32 cannot tell its vertices apart"
    if not float(mesh.areas.sum()) > 1e-12 * side**2:
        return "all its faces are degenerate; it has no surface"
    return ""


def merged(mesh: Mesh) -> Mesh:
    """The same surface with every position stored once: vertices of equal coordinates become one, unused ones go."""
    vertices, which = torch.unique(mesh.vertices + 0.0, dim=0, return_inverse=True)  # + 0.0: -0 equals 0
    faces = which[mesh.faces]
    used, faces = torch.unique(faces, return_inverse=True)
    return Mesh(vertices[used].contiguous(), faces.reshape(-1, 3))


def normalised(mesh: Mesh, *, to: str = "box", size: float = 1.6) -> Mesh:
    """Centre of the bounding box to the origin, and scaled evenly.

    Args:
        to: "box": the longest side of the bounding box becomes `size` (1.6 = [-0.8, 0.8], what octrees are trained on); "sphere": the vertex
            farthest from the centre comes to a distance of `size`.

    Raises: ValueError for a mesh without extent.
    """
    least, greatest = mesh.bounds
    moved = mesh.vertices - (least + greatest) / 2
    extent = (greatest - least).max() if to == "box" else moved[mesh.faces.flatten()].norm(dim=1).max()
    if not float(extent) > 0:
        raise ValueError("a mesh without extent cannot be scaled")
    return Mesh(moved * (size / extent), mesh.faces)
