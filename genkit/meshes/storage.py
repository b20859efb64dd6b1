"""Meshes <-> files: OBJ, PLY, STL, OFF and GLB, each in a file of genkit/meshes/formats."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from genkit import files
from genkit.errors import GenkitError, UsageError
from genkit.meshes.formats.polygons import Polygons
from genkit.meshes.mesh import Mesh, merged, problem_of

FORMATS = ("glb", "obj", "off", "ply", "stl")
SUFFIXES = tuple(f".{name}" for name in FORMATS)
_LONGEST = 300  # characters of a reason: what a broken file holds may have no end


def load(path: str | Path) -> Mesh:
    """A mesh from a file; the end of its name says the format.

    Polygons become triangles, positions that are equal bit for bit one vertex (files of triangle soup share none), vertices of no face go. Nothing else is
    changed: see genkit.meshes.mesh.inspect for what may be wrong.

    Raises: UsageError for another format or a missing file, GenkitError naming the file and what is wrong in it: cut short, a head that promises
        what is not there, no faces, no area, coordinates that are not finite or too large for float32.
    """
    path = Path(path)
    _format(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"no such file: {path}") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder; name a mesh in it") from None
    except OSError as error:
        raise GenkitError(f"{path} cannot be read: {error.strerror or error}") from None
    return parse(data, path.suffix, str(path))


def parse(data: bytes, suffix: str, name: str) -> Mesh:
    """A mesh from the bytes of a file, for what lies in archives; `name` stands in messages. Raises GenkitError as `load`."""
    reader = _format(Path(f"{name}{suffix}" if not name.lower().endswith(suffix.lower()) else name))
    try:
        # Files may hold anything: what is not finite, or too large, is found afterwards and said once.
        with np.errstate(all="ignore"):
            return _checked(reader.read(data) if data else None)
    except OverflowError:
        raise GenkitError(f"{name}: it names a number that is too large") from None
    except (ValueError, MemoryError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise GenkitError(f"{name}: {reason[:_LONGEST] + '...' if len(reason) > _LONGEST else reason}") from None


def _checked(found: Polygons | None) -> Mesh:
    if found is None:
        raise ValueError("empty file")
    if len(found.corners) and (found.corners.min() < 0 or found.corners.max() >= len(found.vertices)):
        wrong = found.corners.max() if found.corners.max() >= len(found.vertices) else found.corners.min()
        raise ValueError(f"a face names vertex {wrong}, counted from 0, of {len(found.vertices)}")
    vertices = torch.from_numpy(found.vertices.astype(np.float32))
    mesh = Mesh(vertices, torch.from_numpy(found.triangles()))
    if (torch.from_numpy(found.vertices).isfinite() & ~vertices.isfinite()).any():
        raise ValueError(f"its coordinates are huge ({np.abs(found.vertices).max():.3g}), more than float32 holds")
    problem = problem_of(mesh)
    if problem:
        raise ValueError(problem)
    return merged(mesh)


def save(mesh: Mesh, path: str | Path) -> None:
    """Write a mesh, whole or not at all. Raises UsageError for another format, ValueError for a mesh without faces."""
    path = Path(path)
    writer = _format(path)
    if not len(mesh.faces):
        raise ValueError(f"a mesh without faces is not written to {path}")
    files.write_bytes(path, writer.write(mesh.vertices.numpy(), mesh.faces.numpy()))


def _format(path: Path) -> ModuleType:
    name = path.suffix.lower().removeprefix(".")
    if name not in FORMATS:
        raise UsageError(
            f"{path}: {path.suffix or 'a name without an end'} is not a format of meshes; known: {', '.join(SUFFIXES)}"
        )
    return importlib.import_module(f"genkit.meshes.formats.{name}")


def check_format(path: str | Path) -> None:
    """Raises UsageError for a name that does not end as that of a mesh."""
    _format(Path(path))


def scan(folder: str | Path) -> list[str]:
    """Paths of all meshes below a folder, relative to it, hidden ones left out, in one fixed order.

    Raises: UsageError for a path that is missing, not a folder, or without meshes.
    """
    root = Path(folder)
    if not root.exists():
        raise UsageError(f"no such folder: {folder}")
    if not root.is_dir():
        raise UsageError(f"{folder} is a file; a folder of meshes is needed")
    found = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )
    if not found:
        raise UsageError(f"{folder} has no meshes; looked for {', '.join(SUFFIXES)} in it and below")
    return found
