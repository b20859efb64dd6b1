"""Contact sheets and turntables of meshes, as files one can open."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from genkit import files
from genkit.images import grid, to_pil
from genkit.meshes.mesh import Mesh, normalised
from genkit.meshes.render import orbit
from genkit.meshes.shading import portrait

if TYPE_CHECKING:
    from PIL import Image

AZIMUTH, ELEVATION = 35.0, 25.0  # degrees, from where a shape is looked at
DISTANCE, DEGREES = 3.6, 36.0  # a sphere of radius 1 fills nine tenths of the picture


def picture(
    mesh: Mesh, size: int = 192, azimuth: float = AZIMUTH, elevation: float = ELEVATION, normalise: bool = True
) -> Tensor:
    """One mesh as people look at it: [3, size, size] in [-1, 1] on white. A mesh without faces is white paper.

    Args:
        normalise: fit the mesh into the picture; False takes [-1, 1]^3 as it is, so that sizes can be compared.
    """
    if not len(mesh.faces):
        return torch.ones(3, size, size)
    fitted = normalised(mesh, to="sphere", size=1.0) if normalise else mesh
    return portrait(fitted, orbit(azimuth, elevation, DISTANCE, DEGREES), size)


def contact_sheet(
    meshes: Sequence[Mesh],
    columns: int | None = None,
    size: int = 192,
    row_names: Sequence[str] = (),
) -> Image.Image:
    """Meshes side by side, row after row; by default about square."""
    columns = columns or max(1, round(len(meshes) ** 0.5 + 0.49))
    return grid(torch.stack([picture(mesh, size) for mesh in meshes]), columns, row_names, scale=1)


def write_turntable(path: Path, mesh: Mesh, frames: int = 36, size: int = 192, seconds: float = 3.0) -> None:
    """A GIF of a mesh that turns once about the y axis."""
    pictures = torch.stack([picture(mesh, size, AZIMUTH + 360 * i / frames) for i in range(frames)])
    images = [image.convert("P") for image in to_pil(pictures)]
    buffer = io.BytesIO()
    images[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=images[1:],
        duration=round(1000 * seconds / frames),
        loop=0,
        optimize=False,
    )
    files.write_bytes(path, buffer.getvalue())
